"""What `prepare.py vg` says at the end: tables of counts."""

from dataset.raw.vg_phrases import DROPPED
from dataset.raw.visual_genome import Report

GAP = "  "


def describe(report: Report) -> str:
    """Images, then each output with its entries and boxes, and the candidates that each rule dropped."""
    images = report.images
    left_out = len(images.evaluation) + len(images.missing)
    rows = [["images in image_data", len(images.used) + left_out]]
    if report.evaluation:
        rows += [["left out: in a val or test split", len(images.evaluation)]]
    rows += [
        [f"{GAP}{file.path}: of {len(file):,} images", found]
        for file, found in zip(report.evaluation, images.found, strict=True)
    ]
    rows += [["left out: not on disk", len(images.missing)]] if images.missing else []
    rows += [["left out: not in image_data", len(images.unknown)]] if images.unknown else []
    rows += [["images used", len(images.used)]]
    parts = [table(rows)]
    if report.evaluation:
        parts.append(_recognised(report))
    parts.append(_outputs(report))
    return "\n\n".join(parts)


def _recognised(report: Report) -> str:
    """What --exclude-eval cannot see."""
    images = report.images
    lines = [
        f"Without coco_id: {images.no_coco:,} images of image_data; without flickr_id: {images.no_flickr:,}; with "
        f"neither, so that no file can tell them: {images.no_id:,}."
    ]
    for file in report.evaluation:
        if not len(file):
            lines.append(f"{file.path}: holds no val or test split, so it left out nothing.")
        if file.unknown:
            lines.append(
                f"{file.path}: images that are not COCO's by name, as RefCLEF's: {file.unknown:,}; Visual Genome has "
                "no ids of theirs, so none could be looked for."
            )
    return "\n".join(lines)


def _outputs(report: Report) -> str:
    drafts = report.drafts.values()
    rows: list[list[object]] = [["", *report.drafts]]
    for name in ("images", "entries", "boxes"):
        rows.append([name, *(getattr(draft, name) for draft in drafts)])
    rows.append(["dropped, by rule:"])
    for rule in DROPPED:
        if any(draft.dropped[rule] for draft in drafts):
            rows.append([GAP + rule, *(draft.dropped[rule] for draft in drafts)])
    text = table(rows)
    for name, draft in report.drafts.items():
        if not draft.entries:
            text += f"\nwarning: {name} holds no entries; training refuses such a file, so leave it out of train_file"
    return text


def table(rows: list[list[object]]) -> str:
    """Lines of cells in columns: the first flush left, numbers flush right and with thousands separators."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    columns = max(map(len, cells))
    widths = [max((len(row[i]) for row in cells if i < len(row)), default=0) for i in range(columns)]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=False))] for row in cells
    ]
    return "\n".join(GAP.join(line).rstrip() for line in lines)
