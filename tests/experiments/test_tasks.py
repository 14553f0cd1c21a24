"""The example tasks of `miras harness`: what the script makes of the novel."""

import json

from experiments.tasks import make


def test_the_files_are_what_the_script_makes(tmp_path, monkeypatch):
    kept = {path.name: path.read_bytes() for path in make.FOLDER.glob("*.jsonl")}
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.main()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert {f"{name}.jsonl" for name in ("austen_last_word", "austen_next")} < set(kept)


def test_every_example_is_of_the_novel():
    novel = make.NOVEL.read_text()
    flat = " ".join(novel.split())
    for line in (make.FOLDER / "austen_last_word.jsonl").read_text().splitlines():
        example = json.loads(line)
        assert example["context"] + example["word"] in novel
    for line in (make.FOLDER / "austen_next.jsonl").read_text().splitlines():
        example = json.loads(line)
        context = " ".join(example["context"].split())
        follows = [f"{context} {choice}" in flat for choice in example["choices"]]
        assert follows == [i == example["answer"] for i in range(4)]
    for line in (make.FOLDER / "austen_text.jsonl").read_text().splitlines():
        assert json.loads(line)["text"] in novel
