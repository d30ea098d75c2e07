"""Every command of docs/bring-your-own.md runs as written, on few images, a small CLIP and a loopback hub.

Added to the commands is only what makes them small.

As a script it runs commands one after another in one process, for importing takes longer than what they do:
`python test_bring_your_own.py <JSON list of command lines>` prints a JSON list of exit statuses.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "bring-your-own.md"
SMALL = ["backbone.embed_dim=16", "backbone.vision_cfg={layers:2,width:64,head_width:64,patch_size:32,image_size:224}"]
QUICK = ["recipe.steps=2", "recipe.batch=4", "recipe.warmup=1", "engine.device=cpu"]
CLASSES = {"pets": ("cat", "red_fox"), "fruit": ("apple", "pear")}


def commands():
    """The command lines of the guide, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]


def quick(command):
    """With a small CLIP, and trainings so short that an expert may get nothing right, by which nothing is divided."""
    scored = ["engine.device=cpu", "scale.criterion=mean"]
    return [*command, *SMALL, *(QUICK if command[0] == "duet-finetune" else scored)]


def write_suites(folder):
    for name, content in re.findall(r"`(my/[\w/.]+)`:\n\n```yaml\n(.*?)```", GUIDE.read_text(), re.S):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def write_images(folder):
    import torch
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    for task, classes in CLASSES.items():
        for part, count in (("train", 8), ("test", 2)):
            for index, name in enumerate(classes):
                place = folder / "data" / task / part / name
                place.mkdir(parents=True)
                for number in range(count):
                    colour = torch.randint(0, 200, (3,), generator=random).tolist()
                    colour[index] = 255
                    Image.new("RGB", (24, 20), tuple(colour)).save(place / f"{number}.jpg")


def leaves(folder):
    """A data set with an image and a label column, as files of a repository."""
    import datasets
    from PIL import Image

    kinds = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["oak", "elm"])})
    files = {}
    for part, count in (("train", 16), ("test", 4)):
        pictures = [Image.new("RGB", (24, 24), (0, 255 * (i % 2), 9 * i)) for i in range(count)]
        made = datasets.Dataset.from_dict({"picture": pictures, "kind": [i % 2 for i in range(count)]}, features=kinds)
        made.to_parquet(str(folder / f"{part}.parquet"))
        files[f"data/{part}-00000-of-00001.parquet"] = folder / f"{part}.parquet"
    return files


def write_experts(folder, base):
    """What was tuned elsewhere: by DDP and torch.save, by Hugging Face's Trainer, by peft on both towers."""
    import torch
    from clips import hugging_face, lora_repository, tuned
    from safetensors.torch import save, save_file

    for seed, (task, run) in enumerate({"pets": "7", "fruit": "9"}.items()):
        state, where = tuned(base, seed), {name: folder / name for name in ("tuned", "runs", "adapters")}
        (where["tuned"] / task).mkdir(parents=True)
        ddp = {f"module.{key}": value for key, value in state.items()}
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
        torch.save({"epoch": 10, "name": task, "state_dict": ddp, "optimizer": optimizer},
                   where["tuned"] / task / "epoch_10.pt")  # fmt: skip
        both = {key: value + 0.1 * torch.ones_like(value) * (key == "ln_final.bias") for key, value in state.items()}
        trainer = {"model.safetensors": save({key: value.clone() for key, value in hugging_face(both).items()}),
                   "config.json": b"{}", "training_args.bin": b"PK"}  # fmt: skip
        for place, files in (
            (where["runs"] / run, trainer),
            (where["adapters"] / task, lora_repository(seed, text=True)),
        ):
            place.mkdir(parents=True)
            for name, content in files.items():
                (place / name).write_bytes(content)
    (folder / "other").mkdir()
    save_file(base, folder / "other" / "clip.safetensors")


def test_the_guide_runs_as_written(tmp_path):
    from clips import base_repository, whole
    from hub import Hub

    folder, base = tmp_path / "here", whole()
    folder.mkdir()
    write_suites(folder)
    write_images(folder)
    write_experts(folder, base)
    lines = commands()
    assert len(lines) == len(re.findall(r"^duet", GUIDE.read_text(), re.M)) >= 10
    with Hub(tmp_path / "served") as hub:
        hub.add("openai/clip-vit-base-patch32", base_repository(base))
        hub.add("your-name/leaves", leaves(tmp_path), kind="datasets")
        done = subprocess.run(
            [sys.executable, __file__, json.dumps([quick(line) for line in lines])],
            cwd=folder, capture_output=True, text=True, timeout=300,
            env=os.environ | hub.env(tmp_path / "hf") | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    statuses = json.loads((done.stdout.splitlines() or ["[]"])[-1])
    assert statuses == [0] * len(lines), done.stdout + done.stderr
    made = {path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors")}
    names = {"checkpoints": ("pets", "fruit", "leaves"), **dict.fromkeys(("short", "halves", "passes", "others"),
                                                                        ("pets", "fruit"))}  # fmt: skip
    assert made == {f"{where}/{task}.safetensors" for where, tasks in names.items() for task in tasks} | {
        "other/clip.safetensors"}  # fmt: skip
    assert done.stdout.count("(was there)") == 1  # of pets, for the second suite
    rows = [json.loads(path.read_text()) for path in (folder / "outputs" / "results").glob("*.json")]
    methods = {(row["suite"], row["method"]) for row in rows}
    assert {("mine", each) for each in ("base", "expert", "ties", "tsv_m", "iso_c", "average")} <= methods
    assert {("hub", each) for each in ("base", "expert", "task_arithmetic")} <= methods
    merges = [row for row in rows if row["method"] == "average"]  # of files, folders and adapters
    remarks = [remark for row in merges for remark in row["remarks"]]
    assert len(merges) == 3 and {row["config"]["experts"]["heads"] for row in merges} == {"suite", "expert"}
    for said in ("fruit: read from its level state_dict", "fruit: names without module.",
                 "fruit: the text tower in the file differs", "fruit: its own text tower reads"):  # fmt: skip
        assert sum(said in remark for remark in remarks) == 1, said
    bases = [row for row in rows if row["method"] == "base"]  # no expert, no text tower of an expert
    assert {row["config"]["experts"]["heads"] for row in bases} == {"suite"} and not any(
        row["remarks"] for row in bases
    )


def test_the_guide_stays_short():
    assert len(GUIDE.read_text().splitlines()) < 120


def main(lines):
    """Run the commands one after another in this process, the Python of the guide in the end."""
    from launchers import finetune, job, run

    statuses = []
    for words in lines:
        sys.argv = words
        job._SETUPS.clear()
        try:
            {"duet": run, "duet-finetune": finetune}[words[0]].main()
            statuses.append(0)
        except SystemExit as stop:
            statuses.append(stop.code or 0)
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S):
        exec(compile(code, str(GUIDE), "exec"), {})
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
