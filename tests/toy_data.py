"""A tiny data set in MiniOneRec's layout."""

from __future__ import annotations

import json
from pathlib import Path

SIDS = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 2), (1, 2, 0), (1, 2, 0), (2, 1, 1), (2, 0, 0)]


def sid(item: int) -> str:
    return "".join(f"<{letter}_{code}>" for letter, code in zip("abc", SIDS[item]))


def write_folder(folder: Path, rows: int = 40) -> Path:
    """A tiny data set in MiniOneRec's layout, where the next item is the last one plus 1."""
    (folder / "index").mkdir(parents=True)
    index = {str(i): [f"<{letter}_{code}>" for letter, code in zip("abc", SIDS[i])] for i in range(8)}
    (folder / "index" / "Toy.index.json").write_text(json.dumps(index, indent=1))
    for split in ("train", "valid", "test"):
        (folder / split).mkdir()
        lines = ["user_id,history_item_title,history_item_sid,item_sid,item_id"]
        for user in range(rows):
            history = [(user + k) % 8 for k in range(1 + user % 4)]
            target = (history[-1] + 1) % 8
            quoted = str([sid(i) for i in history])
            lines.append(f'U{user},"a ""title""\nof two lines","{quoted}",{sid(target)},{target}')
        (folder / split / "Toy_5_2016.csv").write_text("\n".join(lines) + "\n")
    return folder
