"""Visual Genome (Krishna et al., IJCV 2017) to the three training files of AMC, by the rules of `vg_rules`.

Annotations are read as streams, in whatever order of images; entries wait in temporary files until they are written in
the order of image ids. In memory are image_data.json, one image's annotations, and where each image's entries wait.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from dataset.raw.evaluation_images import EvaluationImages, read_evaluation_images
from dataset.raw.vg_fields import Thing, read_regions, read_things
from dataset.raw.vg_files import FAST, Draft, Source, Spool, find_sources
from dataset.raw.vg_images import Images, read_images, read_per_image
from dataset.raw.vg_phrases import describe_attributes, describe_positions, describe_regions
from dataset.raw.vg_rules import OUTPUTS, Rules
from dataset.reading import DataError
from utils import atomic_path, log

SOURCES = {"descriptions": "region_descriptions", "attributes": "attributes", "attributes_spatial": "attributes"}


class Report(NamedTuple):
    """What became of the images, the evaluation files in the order of `images.found`, and the outputs."""

    images: Images
    evaluation: list[EvaluationImages]
    drafts: dict[str, Draft]


def prepare(
    raw: Sequence[Path],
    out: Path,
    rules: Rules,
    outputs: Sequence[str] = tuple(OUTPUTS),
    exclude: Sequence[Path] = (),
    image_root: Path | None = None,
) -> Report:
    """Write `outputs`, keys of `OUTPUTS`, to the folder `out`: all of them or, when something is wrong, none.

    Args:
        raw: folders and files that hold image_data, region_descriptions, attributes and perhaps objects.
        exclude: files of evaluation splits, whose images are left out.
        image_root: leave out images that are not on disk under this folder; None: do not look.

    Raises:
        DataError: a file is missing or cannot be used, or `out` not written; the message names file, entry and key.
    """
    sources = find_sources(raw)
    for kind in ("image_data", *(SOURCES[name] for name in outputs)):
        if kind not in sources:
            where = ", ".join(map(str, raw))
            raise DataError(f"{where}: neither {kind}.json nor {kind}.json.zip is there; download it, or see --only")
    if not FAST:
        log("ijson is without its C parser here, which is some 20 times as fast: pip install --upgrade ijson")
    evaluation = [read_evaluation_images(path) for path in exclude]
    images = read_images(sources["image_data"], evaluation, image_root)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            drafts = {name: Draft(stack.enter_context(Spool(out))) for name in OUTPUTS if name in outputs}
            if "descriptions" in drafts:
                _draft_descriptions(sources, images, rules, drafts["descriptions"])
            if drafts.keys() - {"descriptions"}:
                others = stack.enter_context(Spool(out))
                _draft_attributes(sources, images, rules, others, drafts)
            for name, draft in drafts.items():
                draft.write(stack.enter_context(atomic_path(out / OUTPUTS[name])))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); is there room, and are you allowed to?") from error
    return Report(images, evaluation, drafts)


def _draft_descriptions(sources: dict[str, Source], images: Images, rules: Rules, draft: Draft) -> None:
    for image_id, image, regions in read_per_image(sources["region_descriptions"], "regions", images, read_regions):
        draft.add(image_id, describe_regions(regions, image_id, image, rules, draft.dropped))


def _draft_attributes(
    sources: dict[str, Source], images: Images, rules: Rules, others: Spool, drafts: dict[str, Draft]
) -> None:
    """Both files that come from attributes.json; `others` is where the objects of objects.json wait, if it is there."""
    plain, spatial = drafts.get("attributes"), drafts.get("attributes_spatial")
    if spatial and "objects" in sources:
        for image_id, _, things in read_per_image(sources["objects"], "objects", images, read_things):
            others.add(image_id, json.dumps([(thing.object_id, thing.names, thing.box) for thing in things]))
    for image_id, image, things in read_per_image(sources["attributes"], "attributes", images, read_things):
        if plain:
            plain.add(image_id, describe_attributes(things, image, rules, plain.dropped))
        if spatial:
            rows = json.loads(others.get(image_id) or "[]")
            more = [Thing(object_id, names, [], box and tuple(box)) for object_id, names, box in rows]
            spatial.add(image_id, describe_positions(things, more, image, rules, spatial.dropped))
