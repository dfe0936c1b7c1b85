"""prepare.py scenes: what it writes, keeps, replaces and refuses."""

import json
from pathlib import Path

import pytest

import prepare
from dataset.scenes import files as scenes_files


def run(*words: str) -> None:
    args = prepare.parse_args(list(words))
    args.run(args)


def test_a_complete_folder_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["scenes", str(tmp_path), "--train", "4", "--eval", "2", "--size", "48"]
    run(*command)
    assert capsys.readouterr().out.startswith("wrote 10 images")
    captions = tmp_path / "train_captions.json"
    captions.write_text("changed")
    run(*command)
    assert "already" in capsys.readouterr().out
    assert captions.read_text() == "changed"
    with pytest.raises(SystemExit, match="--force"):
        run(*command, "--seed", "1")
    run(*command, "--force")
    assert len(json.loads(captions.read_text())) == 4


def test_an_interrupted_folder_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["scenes", str(tmp_path), "--train", "4", "--eval", "2", "--size", "48", "--force"]
    run(*command)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scenes_files, "_write_flickr", stop)
        with pytest.raises(KeyboardInterrupt):
            run(*command)
    assert scenes_files.read_manifest(tmp_path) is None
    run(*command[:-1])
    assert scenes_files.read_manifest(tmp_path) is not None


@pytest.mark.parametrize("words", [["--train", "0"], ["--size", "10"], ["--seed", "-1"], ["--eval", "many"]])
def test_bad_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare.parse_args(["scenes", "out", *words])
    assert words[0] in capsys.readouterr().err
