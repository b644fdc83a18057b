"""What is typed is read as it is meant, or answered in one plain line that names the option and what to type."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from multitrain.config import ConfigError, compose, load
from multitrain.config.aliases import HINTS
from multitrain.config.overrides import split, tidy
from multitrain.config.paths import find_run
from multitrain.config.schema import fields
from multitrain.evaluation.settings import with_overrides

RAW = (
    "hydra.cc", "Lexer", "Traceback", "OmegaConf", "omegaconf", "pydantic", "--multirun", "antlr", "full_key", "viable alternative",
    "mismatched", "extraneous", "object at 0x", "Settings", "Config ", "instance of", "NoneType", "dict'", "unable to parse",
)  # fmt: skip
"""What no message may hold: text of the libraries."""


def value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


HOME = os.path.expanduser("~")


@pytest.mark.parametrize(
    ("word", "option", "means"),
    [
        ("data.root=~/data", "data.root", f"{HOME}/data"),
        ("data.root=/d/x (copy)", "data.root", "/d/x (copy)"),
        ("data.root=/d/a=b", "data.root", "/d/a=b"),
        ("data.root=/d/a,b", "data.root", "/d/a,b"),
        ("data.root=/d/{x}", "data.root", "/d/{x}"),
        ("data.root=/d/it's", "data.root", "/d/it's"),
        ('data.root=/d/"q"', "data.root", '/d/"q"'),
        ("data.root=[x]/y", "data.root", "[x]/y"),
        ("data.root=/d/a:b%20;&|*?#!@", "data.root", "/d/a:b%20;&|*?#!@"),
        ("data.root=/d/\\back", "data.root", "/d/\\back"),
        ("data.root=/d/$HOME", "data.root", "/d/$HOME"),
        ("data.root='/d/a,b'", "data.root", "/d/a,b"),
        ('data.root="/d/a (b)"', "data.root", "/d/a (b)"),
        ("data.root=/d/a\\,b", "data.root", "/d/a,b"),
        ("data.root=/d/ü/動画", "data.root", "/d/ü/動画"),
        ("data.root = /d/x", "data.root", "/d/x"),
        ("data.root=null2", "data.root", "null2"),
        ("data.datasets.kinetics.videos=~/v (1)", "data.datasets.kinetics.videos", f"{HOME}/v (1)"),
        ("init_from=~/w=1.pyth", "init_from", f"{HOME}/w=1.pyth"),
        ("init_from=null", "init_from", None),
        ("dry_run = true", "dry_run", True),
        (" nodes =3 ", "nodes", 3),
        ("+optim.lr=3e-4", "optim.lr", 3e-4),
        ("++optim.lr=3e-4", "optim.lr", 3e-4),
        ("name=123", "name", "123"),
        ("name=2001-99-99", "name", "2001-99-99"),
        ("name=true", "name", "true"),
        ("cluster.exclude=n1,n[2-3]", "cluster.exclude", "n1,n[2-3]"),
        ("cluster.python=apptainer exec --nv i.sif python", "cluster.python", "apptainer exec --nv i.sif python"),
        ("cluster.setup=[module load a, source ~/b (c)]", "cluster.setup", ["module load a", "source ~/b (c)"]),
        ("cluster.setup=['a, b', \"c\"]", "cluster.setup", ["a, b", "c"]),
        ("cluster.sbatch={mail-user: me@lab.org}", "cluster.sbatch", {"mail-user": "me@lab.org"}),
        ("cluster.sbatch.mail-user=a@b,c@d", "cluster.sbatch", {"mail-user": "a@b,c@d"}),
        ("model.stages=[1, 3]", "model.stages", (1, 3)),
        ("data=[k400,ssv2]", "data.datasets.ssv2.classes", 174),
        ("+model=tiny", "model.stages", (1, 3)),
        ("~optim.lr", "optim.lr", 4e-4),
        ("~data.datasets.mit", "data.datasets.ssv2.classes", 174),
    ],
)  # fmt: skip
def test_a_word_means_what_it_says(word: str, option: str, means: object) -> None:
    config = compose([word])
    assert value(config, option) == means
    if not word.startswith("~") and "=" in option:
        assert value(with_overrides(compose([]), [word]), option) == means


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.stages=[1,2", "model.stages=[1,2: a closing ] is missing"),
        ("loss.dataset_weights={a: 1", "a closing } is missing"),
        ("model.stages=[1,{2]", "a closing } is missing"),
        ("model.stages=1,2", "write model.stages=[1,2]"),
        ("optim.betas=(0.9,0.99)", "optim.betas='(0.9,0.99)': is a list; write optim.betas=[VALUE,VALUE]"),
        ("optim.lr=1e-4,2e-4", "give one; python launch/sweep.py starts a run for each"),
        ("optim.lr=range(1,3)", "python launch/sweep.py"),
        ("model=tiny,mvit_b16_16x4", "one model for a run; python launch/sweep.py"),
        ("model=[[[[]]]]", "model is chosen by name; known here: auto, mvit_b16_16x4"),
        ("model=" + "[" * 20_000, "characters in one option"),
        ("model.stages=" + "[" * 5_000, "a closing ] is missing"),
        ("model.stages=" + "[" * 500 + "]" * 500, "model.stages"),
        ("model=3", "model is chosen by name"),
        ("model=", "model is chosen by name"),
        ("model=null", "model is chosen by name"),
        ("model=(tiny)", "model is chosen by name"),
        ("model=tiny)", "model is chosen by name"),
        ("data=mine.yaml", "data is chosen by name, not by path; put the file at DIR/data/mine.yaml and write --config-dir DIR data=mine"),
        ("data=/x/data/mine.yaml", "write --config-dir /x data=mine"),
        ("data=k400.yaml", "write data=k400"),
        ("data=../k400", "data is chosen by name; write data=k400"),
        ("optim=3", "optim is chosen by name; known here: adamw"),
        ("monitor=3", "monitor=3: monitor holds several options; set one of them: monitor.NAME=VALUE"),
        ("data.datasets=3", "data.datasets.NAME=VALUE"),
        ("optim.lr=(1)", "optim.lr='(1)': input should be a valid number"),
        ("nodes=2)", "nodes='2)': input should be a valid integer"),
        ("nodes=~", "nodes='~': input should be a valid integer"),
        ("nodes=", "nodes='': input should be a valid integer"),
        ("nodes=a=b", "nodes='a=b': input should be a valid integer"),
        ("nodes=" + "9" * 5000, "nodes="),
        ("seed=" + "9" * 60, "seed="),
        ("model.depth=100000000", "model.depth=100000000: input should be less than or equal to 1000"),
        ("optim.lr=inf", "optim.lr=inf: input should be a finite number"),
        ("optim.lr=nan", "optim.lr=nan"),
        ("optim.lr.x=1", "optim.lr"),
        ("nodes={a: 1}", "nodes={'a': 1}"),
        ("=3", "is no option's name; write key=value"),
        ("a..b=1", "'a..b' is no option's name"),
        (".a=1", "is no option's name"),
        ("data.datasets[0].videos=x", "is no option's name"),
        ("~foo", "~foo: there is no foo to take away; known here: "),
        ("~optim.foo", "there is no optim.foo to take away"),
        ("~model", "model is missing; choose one: model=auto, model=mvit_b16_16x4"),
        ("nodes", "'nodes' is no override; write key=value"),
        ("a\nb=1", "line breaks cannot stand"),
        ("data.root=${x}", "data.root: ${x} names no option"),
        ("data.root=${", "data.root=${: '${' begins the name of another option"),
        ("data.root=${a b}", "begins the name of another option"),
        ("data.root=${oc.env:NO_X}", "data.root: the environment variable NO_X is not set; export NO_X=…, or give data.root=…"),
        ("hydra.x=1", "hydra.x=1: cannot be set here"),
        ("hydra.run.dir=]", "hydra.run.dir=]: cannot be set here"),
        ("hydra.run.dir=/tmp/a", "runs=FOLDER and name=NAME"),
        ("hydra/launcher=basic", "hydra/launcher=basic: cannot be set here"),
        ("+hydra.job.chdir=true", "cannot be set here"),
        ("hydra/launcher=range(1,3)", "hydra/launcher=range(1,3): cannot be set here"),
        ("~model=(", "~model=(: cannot be read; write ~model"),
        ("~a/b;=", "~a/b;=: cannot be read"),
        ("name=x\x1b[31m", "cannot be a folder name"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_plain_line(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([word])
    message = str(caught.value)
    assert says in message, message
    assert "\n" not in message
    assert len(message) < 700
    assert not [text for text in RAW if text in message], message


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("batch_size=4", "effective_batch=N"),
        ("batch-size=4", "effective_batch=N"),
        ("TRAIN.BATCH_SIZE=64", "unknown option 'TRAIN.BATCH_SIZE'; use effective_batch=N"),
        ("SOLVER.BASE_LR=0.1", "optim.lr=X"),
        ("learning_rate=1", "optim.lr=X"),
        ("lr=1", "optim.lr"),
        ("LR=1", "optim.lr"),
        ("workers=4", "data.workers"),
        ("num_workers=4", "data.workers"),
        ("DATA_LOADER.NUM_WORKERS=4", "data.workers"),
        ("epochs_num=4", "epochs=X"),
        ("SOLVER.MAX_EPOCH=4", "epochs=X"),
        ("num_gpus=2", "gpus=N"),
        ("NUM_GPUS=2", "gpus=N"),
        ("fp16=true", "precision=fp16"),
        ("bf16=true", "precision=bf16"),
        ("OUTPUT_DIR=x", "runs=FOLDER"),
        ("DATA.PATH_TO_DATA_DIR=x", "data.root=FOLDER"),
        ("TRAIN.CHECKPOINT_FILE_PATH=x", "init_from=WEIGHTS"),
        ("gradient_accumulation_steps=2", "effective_batch"),
        ("drop_path=0.1", "model.drop_path"),
        ("model.num_frames=16", "model.frames"),
        ("weight_decay=1", "optim.weight_decay"),
        ("optim.learning_rate=1", "optim.lr=X"),
        ("acount=x", "did you mean 'cluster.account'"),
        ("data.worker=x", "did you mean 'workers'"),
        ("zzz=1", "updates"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_ours(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([word])
    assert says in str(caught.value)
    assert "…, " not in str(caught.value), "the list is not cut off"
    assert not str(caught.value).endswith("…")


def test_hints_name_options_that_there_are() -> None:
    known = set(fields())
    for hint in HINTS.values():
        names = [
            w.partition("=")[0].strip("(),;")
            for w in hint.split()
            if "." in w.partition("=")[0].strip(".") and "/" not in w and w != "e.g."
        ]
        for name in names:
            dotted = name.replace("NAME", "<name>")
            assert dotted in known, hint
    assert not set(HINTS) & {name for name in known if "." not in name}, "an option of ours is no alias"


def own(folder: Path, text: str, name: str = "data/own.yaml") -> list[str]:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return [str(folder)]


ENTRY = "datasets:\n  own: {annotations: ~/a, videos: /v, classes: 7}\n"


@pytest.mark.parametrize(
    "name", ["plain", "with blank", "a=b", "a,b", "(copy)", "it's", "[x]", "{y}", "ü", "a:b", "50%", "$x", '"q"']
)
def test_a_config_dir_may_have_any_name(tmp_path: Path, name: str) -> None:
    config = compose(["data=own"], config_dirs=own(tmp_path / name, ENTRY))
    assert config.data.datasets["own"].annotations == f"{HOME}/a"
    moved = with_overrides(compose([]), ["data=own"], config_dirs=[tmp_path / name])
    assert list(moved.data.datasets) == ["own"]


def test_a_wrong_config_dir_is_said(tmp_path: Path) -> None:
    def refused(*dirs: str) -> str:
        with pytest.raises(ConfigError) as caught:
            compose(["data=own"], config_dirs=dirs)
        return str(caught.value)

    assert "--config-dir nope: no such folder" in refused("nope")
    (tmp_path / "file").touch()
    assert "is a file; give the folder" in refused(str(tmp_path / "file"))
    own(tmp_path, ENTRY, "own.yaml")
    assert f"move it to {tmp_path}/data/own.yaml" in refused(str(tmp_path))
    assert "need --config-dir DIR" in refused()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("datasets: [", "own.yaml: not YAML"),
        ("a: &a [*a]", "&a contains itself"),
        ("[" * 20_000, "more than 100 deep"),
        ("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
         "more than 200,000 values"),
        ("workers: " + "9" * 5000, "a number of 5000 digits"),
        ("workers: 2001-99-99\n" + ENTRY, "data.workers='2001-99-99': input should be a valid integer"),
        ("just text", "own.yaml: holds no settings"),
        ("- a\n- b", "own.yaml: holds no settings"),
        ("datasets: {own: {annotations: ${data.rot}/a, videos: /v, classes: 7}}", "not YAML"),
        ('datasets: {own: {annotations: "${data.rot}/a", videos: /v, classes: 7}}', "${data.rot} names no option"),
        ("defaults: [nothing]\n" + ENTRY, "data=nothing: there is no such data"),
        ("batch_size: 3\n" + ENTRY, "unknown option 'data.batch_size'; use effective_batch=N"),
    ],
)  # fmt: skip
def test_a_wrong_yaml_of_the_users_own_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    dirs = own(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        compose(["data=own"], config_dirs=dirs)
    message = str(caught.value)
    assert says in message, message
    assert "\n" not in message
    assert not [raw for raw in RAW if raw in message], message


def test_yaml_that_is_not_chosen_is_not_read(tmp_path: Path) -> None:
    own(tmp_path, "[" * 20_000, "data/broken.yaml")
    assert list(compose(["data=own"], config_dirs=own(tmp_path, ENTRY)).data.datasets) == ["own"]


@pytest.mark.parametrize(
    "text", ["nodes: [", "[" * 20_000, "seed: " + "9" * 5000, "a: &a [*a]", "", "- 1", "\0", "nodes: 2001-99-99"]
)
def test_a_damaged_config_of_a_run_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_are_tidied_before_they_are_kept() -> None:
    assert tidy("dry_run = true") == "dry_run=true"
    assert tidy("first") == "first"
    assert tidy("data.root=/a b ") == "data.root=/a b"
    assert split("++ optim.lr = 1").word == "++optim.lr=1"


def test_a_run_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "demo").mkdir()  # the demo's data, no run
    (tmp_path / "runs/demo/config.yaml").touch()
    assert find_run("demo") == Path("runs/demo")
    assert find_run("./demo") == Path("./demo")
    assert find_run("other") == Path("other")
    assert find_run("runs/demo") == Path("runs/demo")
    assert find_run("\0") == Path("\0")
    assert find_run("x" * 5000) == Path("x" * 5000)
    (tmp_path / "w.pyth").touch()
    assert find_run("w.pyth") == Path("w.pyth")
    assert compose(["init_from=demo"]).init_from == "runs/demo"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optim/lr=1", "optim/lr=1: there is no config group 'optim/lr'; write optim.lr=1"),
        ("optm/adamw=1", "there is no config group 'optm/adamw'; known here: augment, cluster, data"),
        ("optim.betas=[1,2,3]", "optim.betas=[1,2,3]: is a list of 2 values, not of 3"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: is a list of 2 values, not of 1"),
        ("augment.crop_area=[]", "augment.crop_area=[]: is a list of 2 values, not of 0"),
        ("dry_run=maybe", "dry_run='maybe': is true or false"),
        ("data.datasets.mit.flip=3", "is true or false"),
    ],
)
def test_lists_switches_and_groups_are_answered_in_the_words_of_the_options(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([word])
    assert says in str(caught.value)
    assert not [raw for raw in (*RAW, "after validation", "unable to interpret") if raw in str(caught.value)]


def test_choices_that_are_offered_include_those_of_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("datasets: {}")
    with pytest.raises(ConfigError, match="data=mine"):
        compose(["~data"], config_dirs=[tmp_path])
