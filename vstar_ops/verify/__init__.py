"""Every op on every backend of this machine against float64 oracles: ``python -m vstar_ops.verify``.

The oracles are a second writing of every op in plain Python and NumPy, independent of the library and of its
reference backend. Read in this order: ``sweep`` (which calls are made, and what is counted), ``sampling`` and
``cases`` (the calls), ``wants``, ``winners`` and ``judge`` (what they should return, and how far off a result
is), ``oracles``, ``search`` and ``loss`` (the ops, written a second time), ``checks`` (the same bits in other
runs, batches and threads), ``shrink`` and ``script`` (the smallest failing call as a program).
"""
