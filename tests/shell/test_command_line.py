"""What a command line says before there is work: help, hints, flags, and options that a run keeps."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dpm_scales.cli import configs
from dpm_scales.cli.arguments import ALIASES, split_flags, tidy
from dpm_scales.cli.main import loading, main
from dpm_scales.cli.output import lasting_output, without_controls
from dpm_scales.errors import nearest, printable
from support.shell import ROOT, SMALL, call, composed, settings

COMMANDS = ("train", "sample", "evaluate", "evolve")
ESCAPE = "\x1b]0;owned\x07"


def error(script: str, *arguments: str, cwd: Path) -> str:
    """The one line of a command that is refused."""
    outcome = call(script, *arguments, cwd=cwd)
    assert outcome.status == 2 and outcome.out == "", outcome
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1, outcome.err
    return outcome.err.removeprefix("error: ").rstrip("\n")


# --- without torch ----------------------------------------------------------------------------------------------------

LINES = [
    *(f"{name}.py --help" for name in COMMANDS),
    *("train.py sede=1", "train.py optimizer.lr=1", "train.py process=haet", "train.py --lr 0.1", "train.py run_dir="),
    *("sample.py model=x out=y num_sample=3", "sample.py task=inpait", "evaluate.py refernce=x", "evolve.py ot=x"),
    *("train.py conditional=no", "train.py run_dir=stored sede=1", "sample.py model=x out=y trajectory=no"),
]


def test_help_and_mistakes_do_not_wait_for_torch(tmp_path: Path) -> None:
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "overrides.yaml").write_text("[process=heat, trainer.max_steps=3]")
    program = f"""
import io, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
sys.path.insert(0, {str(ROOT)!r})
for line in {LINES!r}:
    script, *sys.argv[1:] = line.split()
    sys.argv[0] = script
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path({str(ROOT)!r} + "/" + script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
    assert status == (0 if "--help" in line else 2), (line, err.getvalue())
    loaded = [name for name in ("torch", "lightning", "torchvision", "skimage", "matplotlib") if name in sys.modules]
    assert not loaded, (line, loaded)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- help -------------------------------------------------------------------------------------------------------------


def help_of(name: str, *arguments: str) -> str:
    outcome = call(f"{name}.py", *arguments, "--help", cwd=ROOT)
    assert outcome.status == 0 and outcome.err == ""
    return outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_with_its_comment(name: str) -> None:
    words = help_of(name).split()
    _, options = configs.read_options(ROOT / "configs" / f"{name}.yaml")
    assert options
    for option in options:
        if option.text and option.key not in configs.groups(name):
            assert any(word.startswith(f"{option.key}=") for word in words), option.key
            assert " ".join(option.comment.split()) in " ".join(words), option.comment


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_three_examples_that_compose(name: str) -> None:
    lines = help_of(name).splitlines()
    first = lines.index("examples:") + 1
    examples = lines[first : lines.index("", first)]
    assert len(examples) == 3
    for example in examples:
        python, script, *arguments = shlex.split(example)
        assert (python, script) == ("python", f"{name}.py")
        options = [a for a in tidy(arguments, ALIASES.get(name, {})) if a != "-m"]
        single = ["=".join([key, value.split(",")[0]]) if "-m" in arguments else f"{key}={value}"
                  for key, _, value in (option.partition("=") for option in options)]  # fmt: skip
        composed(*single, name=name)


def test_help_has_the_groups_of_its_command_alone() -> None:
    def groups(name: str) -> list[str]:
        text = help_of(name).partition("groups, GROUP=NAME:\n")[2].partition("\n\n")[0]
        return [line.split(":")[0].strip() for line in text.splitlines() if ":" in line]

    inner = ["process/blur", "process/clock", "process/color", "process/noise"]
    assert groups("sample") == ["sampler", "sampler/noise_color", "task"]
    assert groups("evaluate") == ["sampler", "sampler/noise_color"]
    assert groups("evolve") == ["task", "process", *inner]
    outer = ["data", "process", *inner, "target", "weight", "prior", "network", "sampler", "sampler/noise_color"]
    assert groups("train") == [*outer, "trainer", "logger", "experiment"]
    assert "process: blurring, blurring_chain" in help_of("train")


def test_help_follows_the_choices(tmp_path: Path) -> None:
    text = help_of("train", "process=heat", "process/noise=edm", "trainer=fsdp")
    assert "process.noise.noise_max=80.0" in text and "process.blur.blur_sigma_max=24.0" in text
    assert "trainer.strategy=fsdp" in text and "trainer.max_steps=2200" in text
    assert "blur_sigma_max=24.0" in help_of("train", "experiment=digits_heat")
    assert "\n  covariance=" in help_of("sample", "task=inpaint") and "\n  covariance=" not in help_of("sample")
    text = help_of("evolve")
    assert "  data=null" in text and "folder=" not in text
    (tmp_path / "process").mkdir()
    (tmp_path / "process" / "mine.yaml").write_text("# my own\n_target_: mine.Process\nspeed: 3  # per hour\n")
    text = help_of("train", "--config-dir", str(tmp_path), "process=mine")
    assert "process=mine: my own" in text and "process.speed=3" in text and "per hour" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = help_of("train").partition("options, KEY=VALUE:")[2].splitlines()
    assert max(len(row) for row in rows) <= min(width, 120) + 12  # of a key and value that are wider by themselves


# --- hints ------------------------------------------------------------------------------------------------------------

HINTS = {
    "train.py optimizer.lr=1e-4": "unknown option 'optimizer.lr': did you mean 'optimizer.learning_rate'? allowed:",
    "train.py lr=1e-4": "unknown option 'lr': did you mean 'optimizer.learning_rate'?",
    "train.py max_steps=4": "unknown option 'max_steps': did you mean 'trainer.max_steps'?",
    "train.py batch_size=4": "unknown option 'batch_size': did you mean 'data.batch_size' or 'evaluation.batch_size'?",
    "train.py trainer.learning_rate=4": "unknown option 'trainer.learning_rate': did you mean 'optimizer.learning_",
    "train.py optimizer.wd=0": "unknown option 'optimizer.wd': did you mean 'optimizer.weight_decay'?",
    "train.py trainer.gradient_clip=1": "unknown option 'trainer.gradient_clip': did you mean 'trainer.gradient_clip_v",
    "train.py sede=4": "unknown option 'sede': did you mean 'seed'?",
    "train.py process=heat process.blur.blur_sigmas=[1,2]": (
        "unknown option 'process.blur.blur_sigmas': it belongs to process/blur=listed_sigmas"
    ),
    "train.py process.min_decay=0": (
        "unknown option 'process.min_decay': it belongs to process=blurring and process=clocked and "
    ),
    "train.py data.root=x": "unknown option 'data.root': it belongs to data=bsds500 and data=celeba and",
    "train.py process/noise=edm process.noise.noise_mx=3": "unknown option 'process.noise.noise_mx': did you mean",
    "sample.py model=x out=y sampler=ddim sampler.s_churn=1": "unknown option 'sampler.s_churn': it belongs to",
    "evaluate.py reference=x num_images=3": "unknown option 'num_images': did you mean 'num_samples'?",
    "train.py data=folder data.root=five data.batch_size=8": (
        "data.batch_size=8 exceeds the 5 training images; set data.batch_size <= 5 or data.drop_last=false"
    ),
    "train.py --lr 0.1": "--lr 0.1: options are KEY=VALUE: optimizer.learning_rate=0.1",
    "train.py --batch-size=8 seed=1": "--batch-size=8: options are KEY=VALUE: data.batch_size=8",
    "sample.py --out x model=y": "--out x: options are KEY=VALUE: out=x",
    "evolve.py --task": "--task: options are KEY=VALUE: task=VALUE",
    "train.py -x": "-x: options are KEY=VALUE: x=VALUE",
    "train.py --config-dir": "--config-dir needs a value: --config-dir VALUE",
    "train.py --config-dir=": "--config-dir is empty",
    "train.py -m seed=1 --cfg job": "--multirun and --cfg exclude each other; leave one out",
    "train.py --cfg jop": "unknown --cfg 'jop': did you mean 'job'? allowed: all, hydra, job",
    "train.py --": "--: options are KEY=VALUE: KEY=VALUE",
    "train.py data=3": "data is chosen by a name, and can't be 3; leave it out for the default",
    "train.py -m process=vp,3": "process is chosen by a name, and can't be vp,3; leave it out for the default",
    "train.py experiment=3": "experiment is chosen by a name, and can't be 3; leave it out for the default",
    "train.py ~sede": "unknown option 'sede': did you mean 'seed'?",
    "train.py process/blur=log": (
        "process=vp takes no process/blur, only process/clock, process/color, process/noise; leave it out, or choose "
        "process=blurring, blurring_chain, blurring_constant, clocked or one of "
    ),
    "train.py process=osmosis_diffusion process/clock=spectral": (
        "process=osmosis_diffusion takes no process/clock, only process/blur, process/color, process/noise; leave it "
        "out, or choose process=blurring, blurring_constant, clocked, cut_off or one of "
    ),
    "train.py process=inverse_osmosis process/clock=spectral process.clock.spread=2": (
        "process=inverse_osmosis takes no process/clock, only process/blur, process/color, process/noise; leave it "
    ),
    "train.py experiment=mnist_osmosis_flow process/clock=spectral": (
        "process=osmosis_diffusion takes no process/clock, only "
    ),
    "train.py -m process=vp,osmosis_diffusion process/clock=spectral": (
        "process=osmosis_diffusion takes no process/clock, only "
    ),
    "train.py process=osmosis_diffusion +process/clock=spectral": (
        "unknown option 'process.clock': allowed: process.blur"
    ),
    "train.py process=vp +process/color=power_law": (
        "process/color is in the config already; write process/color=power_law without the +"
    ),
    "sample.py +sampler=ddim": "sampler is in the config already; write sampler=ddim without the +",
    "evolve.py process=osmosis process/color=white": "process=osmosis takes no process/color, only process/blur; leave",
    "train.py process=osmosis_diffusion process/clock=spectrl": "process=osmosis_diffusion takes no process/clock, ",
    "train.py process=vp process/clock=spectrl": "unknown process/clock 'spectrl': did you mean 'spectral'? ",
    "train.py process=vp,heat": "process=vp,heat gives several values: -m makes a run of each, and process=[vp,heat]",
    "train.py process=heat process.blur={_target_:dpm_scales.schedules.LogBlur} process.blur.blur_sigma_mx=3": (
        "unknown option 'process.blur.blur_sigma_mx': "
    ),
    "train.py process=haet --help": "unknown process 'haet': did you mean 'heat'? allowed: ",
    "train.py --config-dir nowhere": "--config-dir nowhere: no such folder",
}


@pytest.mark.parametrize("line", HINTS)
def test_hints(line: str, tmp_path: Path) -> None:
    from support.shell import photos

    if "five" in line:
        photos(tmp_path / "five", 5, (8, 8))
        line_options = ["data.val_fraction=0.0", "run_dir=run"]
    else:
        line_options = []
    script, *arguments = line.split()
    assert error(script, *arguments, *line_options, cwd=tmp_path).startswith(HINTS[line])


def test_hints_know_the_users_own_configs(tmp_path: Path) -> None:
    (tmp_path / "own" / "process").mkdir(parents=True)
    body = (ROOT / "configs" / "process" / "heat.yaml").read_text()
    (tmp_path / "own" / "process" / "mine.yaml").write_text(body)
    line = error("train.py", "--config-dir", "own", "process=mine", "process.num_scale=3", cwd=tmp_path)
    assert line.startswith("unknown option 'process.num_scale': did you mean 'process.num_scales'? allowed: ")


def test_a_plus_is_blamed_only_where_the_group_has_a_choice(tmp_path: Path) -> None:
    """A config of the user's own may lack a nested group, which a + then adds; the mistake is another."""
    (tmp_path / "own" / "process").mkdir(parents=True)
    (tmp_path / "own" / "process" / "mine.yaml").write_text("_target_: dpm_scales.processes.VP\n")
    given = ["--config-dir", "own", "process=mine", "+process/clock=spectral"]
    assert error("train.py", *given, "seed=1,2", cwd=tmp_path).startswith("seed=1,2 gives several values: ")


def test_nearest_names() -> None:
    options = ["optimizer.learning_rate", "optimizer.decay", "optimizer.warmup_steps"]
    assert nearest("optimizer.lr", options) == "optimizer.learning_rate"
    assert nearest("optimizer.LR", options) == "optimizer.learning_rate"
    assert nearest("optimizer.warmup", options) == "optimizer.warmup_steps"
    assert nearest("optimizer.xyz", options) is None
    assert nearest("haet", ["heat", "vp"]) == "heat"
    assert nearest("val_interval", ["val_check_interval", "devices"]) == "val_check_interval"


def test_flags_come_first_and_keep_their_values() -> None:
    argv = ["a=1", "-cd", "own", "b=2", "--config-name=x", "--cfg", "job"]
    flags = ["--config-dir=own", "--config-name=x", "--cfg=job"]
    assert split_flags(argv) == (flags, ["a=1", "b=2"])
    assert split_flags(["--multi", "--config-d", "own"]) == (["--multirun", "--config-dir=own"], [])
    assert split_flags(["--info", "defaults", "a=1"]) == (["--info=defaults"], ["a=1"])
    assert split_flags(["--info", "a=1"]) == (["--info"], ["a=1"])
    assert tidy(tidy(argv)) == tidy(argv)


# --- a class of the user's own ----------------------------------------------------------------------------------------


def test_another_class_has_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the class before it are gone, unless both take them or they were given."""
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "class MyNet(nn.Module):\n"
        "    def __init__(self, in_channels, out_channels, num_classes=None, width=3, dropout=0.5):\n"
        "        super().__init__()\n"
        "        self.dropout, self.conv = dropout, nn.Conv2d(in_channels, width, 1)\n"
        "        self.last = nn.Conv2d(width, out_channels, 1)\n"
        "    def forward(self, x, t, labels=None):\n"
        "        return self.last(self.conv(x))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("network._target_=mynet.MyNet", "network.width=5")
    small = [option for option in SMALL if not option.startswith("network")]
    outcome = call("train.py", *small, *own, "trainer.max_steps=1", "run_dir=run", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    expected = {"_target_": "mynet.MyNet", "width": 5, "dropout": 0.0}
    given = ("in_channels", "out_channels", "num_classes")
    assert {k: v for k, v in settings(tmp_path / "run")["network"].items() if k not in given} == expected
    (tmp_path / "broken.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self, in_channels, out_channels, num_classes=None): raise RuntimeError('a defect')\n"
    )
    with pytest.raises(Exception, match="a defect"):
        call("train.py", *small, "network._target_=broken.Net", "run_dir=other", cwd=tmp_path)
    line = error("train.py", *small, *own, "network.widths=[8]", "run_dir=other", cwd=tmp_path)
    assert line.startswith("unknown option 'network.widths': did you mean 'network.width'? allowed: ")
    assert not (tmp_path / "other").exists()


# --- what reaches the terminal ----------------------------------------------------------------------------------------


def test_escapes_in_names_are_shown_as_escapes(tmp_path: Path) -> None:
    lines = [
        error("sample.py", f"model={ESCAPE}", "out=out", cwd=tmp_path),
        error("train.py", f"seed=1{ESCAPE}", cwd=tmp_path),
        error("train.py", f"{ESCAPE}=1", cwd=tmp_path),
        error("train.py", f"--{ESCAPE}", cwd=tmp_path),
        error("train.py", "data=folder", f"data.root={ESCAPE}", cwd=tmp_path),
        error("train.py", f"resume={ESCAPE}", cwd=tmp_path),
    ]
    for line in lines:
        assert printable(line) == line and r"\x1b" in line and "owned" in line, line


def test_escapes_in_lines_of_sweeps(tmp_path: Path) -> None:
    sweep = ("-m", *SMALL, "process.num_scales=0,-1", f"+note='{ESCAPE}'", "run_dir=sweep")
    outcome = call("train.py", *sweep, cwd=tmp_path)
    assert outcome.status == 2 and "failed: " in outcome.err, outcome.err
    assert "\x1b" not in outcome.err and r"\x1b" in outcome.err


def test_escapes_in_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    for name in ("HYDRA_FULL_ERROR", "DPM_SCALES_TRACEBACK", "OC_CAUSE"):
        monkeypatch.setenv(name, "0")
    lines: list[str] = []
    main(lambda: lines.append(warnings.formatwarning(f"no image:\n {ESCAPE}", UserWarning, "a.py", 1)), "train")
    assert lines == ["warning: no image: \\x1b]0;owned\\x07\n"]


def test_printable() -> None:
    assert printable("a\x1b[2J\x07\x9b\u202e\udcff\u2028é 漢") == r"a\x1b[2J\x07\x9b\u202e\udcff\u2028é 漢"


@pytest.mark.parametrize(
    "mark", ["\u200e", "\u200f", "\u061c", "\u202a", "\u202e", "\u2066", "\u2069", "\u2028", "\x9b", "\x1b"]
)
def test_controls_are_escaped_on_both_streams(mark: str, capfd: pytest.CaptureFixture[str]) -> None:
    with lasting_output():
        print(f"in a{mark}b", flush=True)
        print(f"at a{mark}b", file=sys.stderr, flush=True)
    streams = capfd.readouterr()
    assert streams.out == f"in a{printable(mark)}b\n" and streams.err == f"at a{printable(mark)}b\n"
    assert mark not in streams.out + streams.err


def test_colours_and_moves_of_a_progress_bar_are_kept() -> None:
    moves = "\r\x1b[2K\x1b[1A\x1b[32;1m━━\x1b[0m\x1b[?25l\x1b[?25h\t漢\n"
    assert without_controls(moves) == moves
    assert without_controls("\x1b[2J\x1b]0;owned\x07") == r"\x1b[2J\x1b]0;owned\x07"


def test_a_typed_folder_is_printed_with_escapes(tmp_path: Path) -> None:
    """On standard output at the end, and in the message of a second attempt."""
    options = ("task=audit", "process=vp", "process.num_scales=2", "out=a\u202eb")
    outcome = call("evolve.py", *options, cwd=tmp_path)
    assert outcome.status == 0 and (tmp_path / "a\u202eb" / "audit.md").is_file(), outcome.err
    assert r"in a\u202eb/audit.md" in outcome.out and "\u202e" not in outcome.out + outcome.err
    line = error("train.py", "run_dir=a\u200fb", "optimizer.lr=-1", cwd=tmp_path)
    assert "\u200f" not in line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_loading_is_told_on_a_terminal_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with loading("torch"):
        assert screen.getvalue() == "loading torch …"
    assert screen.getvalue().endswith("\r\x1b[K")
    monkeypatch.setattr(sys, "stderr", file)
    with loading("torch"):
        pass
    assert file.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", second := Terminal())
    monkeypatch.setenv("LOCAL_RANK", "1")
    with loading("torch"):
        pass
    assert second.getvalue() == ""


def test_other_names_of_options_and_choices() -> None:
    assert tidy(["task=generate", "model=a"], ALIASES["sample"]) == tidy(["task=draw", "model=a"], ALIASES["sample"])
    assert tidy(["baseline=a=b", "baseline_split=all"], ALIASES["evaluate"]) == [
        "yardstick='a=b'",
        "yardstick_split=all",
    ]
    composed(*tidy(["task=generate"], ALIASES["sample"]), name="sample")
    composed(*tidy(["baseline=data", "baseline_split=all"], ALIASES["evaluate"]), name="evaluate")
