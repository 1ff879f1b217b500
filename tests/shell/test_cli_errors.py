"""A user's mistake ends with one line on standard error that says what to do, status 2, and nothing half-written."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpm_scales.cli.arguments import tidy
from dpm_scales.errors import UserError, require_number, suggest
from support.shell import SMALL, Outcome, call, listing, photos, run, settings, train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, images and broken files, in which every command of a table is called."""
    root = tmp_path_factory.mktemp("place")
    train(root / "digits")
    train(root / "labels", "conditional=true", "trainer.max_steps=1")
    train(root / "heat", "process=heat", "process.num_scales=4", "sampler.steps=null", "trainer.max_steps=1")
    photos(root / "good", 24)
    photos(root / "mixed", 12)
    photos(root / "mixed", 12, size=(16, 16), first=12)
    for name in ("text", "cut"):
        shutil.copytree(root / "good", root / name)
    (root / "text" / "005.png").write_text("hello")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(root / "cut" / "a.jpg")
    data = (root / "cut" / "a.jpg").read_bytes()
    (root / "cut" / "a.jpg").write_bytes(data[: len(data) // 2])
    for name in ("rotten", "older", "strange"):
        shutil.copytree(root / "digits", root / name)
    for path in (root / "rotten" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes().replace(b"data", b"DATA", 1))
    shutil.copytree(root / "digits" / "model", root / "flipped")
    tensors = root / "flipped" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    values = torch.load(root / "older" / "checkpoints" / "last.ckpt", weights_only=True)
    values["recipe"]["version"] = 2
    torch.save(values, root / "older" / "checkpoints" / "last.ckpt")
    (root / "strange" / "overrides.yaml").write_text("[data._target_=os.system]\n")
    photos(root / "classes" / "cat", 4)
    (root / "classes" / "eel").mkdir()
    with zipfile.ZipFile(root / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**22))
    with zipfile.ZipFile(root / "outside.zip", "w") as archive:
        archive.writestr("../a.png", b"x")
    (root / "empty").mkdir()
    (root / "file").write_text("not a folder")
    (root / "config.yaml").write_text("learning_rate: 3\n")
    torch.save({"state_dict": {"w": torch.zeros(1)}, "epoch": 1}, root / "foreign.ckpt")
    np.save(root / "floats.npy", np.zeros((4, 8, 8)))
    (root / "configs" / "experiment").mkdir(parents=True)
    for name, body in {
        "typo_process": "process: {num_scale: 3}",
        "typo_section": "ema: {deca: 0.9}",
        "typo_root": "sede: 3",
        "typo_trainer": "trainer: {max_stps: 3}",
        "typo_choice": "defaults:\n  - override /process: het",
    }.items():
        (root / "configs" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{body}\n")
    return root


def assert_one_line(outcome: Outcome, message: str, status: int = 2) -> None:
    assert outcome.status == status, outcome.out + outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in outcome.err, outcome.err
    assert re.search(message, lines[0]), lines[0]


# --- train.py ---------------------------------------------------------------------------------------------------------

FOLDER = "data=folder data.batch_size=4 "
EXTRA = "hydra.searchpath=[file://{place}/configs] "

TRAIN = {
    # names
    "process=haet": "unknown process 'haet': did you mean 'heat'. allowed: blurring, ",
    "process=Heat2": "unknown process 'Heat2': did you mean 'heat'",
    "process/noise=cosin": "unknown process/noise 'cosin': did you mean 'cosine'",
    "data=cifar": "unknown data 'cifar': did you mean 'cifar10'",
    "network=larg": "unknown network 'larg'",
    "target=epsilon": "unknown target 'epsilon': .*noise",
    "logger=wndb": "unknown logger 'wndb': did you mean 'wandb'",
    "trainer=dpp": "unknown trainer 'dpp': did you mean 'ddp'",
    "experiment=digits_het": "unknown experiment 'digits_het': did you mean 'digits_heat'",
    "procss=vp": "unknown option 'procss': did you mean 'process'",
    "experimnt=digits_vp": "unknown option 'experimnt': did you mean 'experiment'",
    "sede=1": "unknown option 'sede': did you mean 'seed'",
    "steps=10": "unknown option 'steps': did you mean 'trainer.max_steps' or 'sampler.steps'. allowed: ",
    "out=x": "unknown option 'out': did you mean 'run_dir'. allowed: ",
    "--out x": "--out x: options are KEY=VALUE: run_dir=x",
    "--config-dir nowhere": "--config-dir nowhere: no such folder",
    "network=nope": "unknown network 'nope': .*; a config of your own needs --config-dir DIR$",
    "experiment=mine": "unknown experiment 'mine': .*; a config of your own needs --config-dir DIR$",
    "process.num_scale=3": "unknown option 'process.num_scale': did you mean 'process.num_scales'",
    "process=heat process.blur.sigma_max=3": "unknown option 'process.blur.sigma_max': .*process.blur.blur_sigma_max",
    "process.blur.blur_sigma_max=3": "unknown option 'process.blur': it belongs to process=blurring and ",
    "trainer.max_step=3": "unknown option 'trainer.max_step': did you mean 'trainer.max_steps'",
    "optimizer.lr=0.1": "unknown option 'optimizer.lr': did you mean 'optimizer.learning_rate'",
    "scale_sampling.std=1": "scale_sampling has no options of its own; did you mean 'scale_std'",
    "compile.mode=x": "'compile.mode': compile has no options of its own; give compile=VALUE alone$",
    "process.color.expnent=1": "mean 'process.color.exponent'. allowed: .*, each with its choice of process/color$",
    "prior.foo=1": "unknown option 'prior.foo': allowed: prior.max_images, .*, each with its choice of prior$",
    "+colour=red": "unknown option 'colour'",
    "process=vp process.blur={_target_:dpm_scales.schedules.LogBlur}": "unknown option 'process.blur'",
    "process._target_=dpm_scales.processes.Vp": "process._target_=dpm_scales.processes.Vp: there is no such class",
    "process=null": "process is chosen by a name, and can't be null; leave it out",
    "~process": "the option 'process' was removed, and is needed",
    "optimizer=3": "optimizer holds options, optimizer.NAME=VALUE, .* got optimizer=3",
    "process._target_=os.system": "os.system",
    # grammar
    "process": "'process' is not an option: write KEY=VALUE",
    "network.widths=[8,8": "'network.widths=.8,8' is not an option",
    # experiments of the user's own
    EXTRA + "experiment=typo_process": "unknown option 'process.num_scale': did you mean 'process.num_scales'",
    EXTRA + "experiment=typo_section": "unknown option 'ema.deca': did you mean 'ema.decay'",
    EXTRA + "experiment=typo_root": "unknown option 'sede': did you mean 'seed'",
    EXTRA + "experiment=typo_trainer": "unknown option 'trainer.max_stps': did you mean 'trainer.max_steps'",
    EXTRA + "experiment=typo_choice": "unknown process 'het': did you mean 'heat'",
    # values
    "process.num_scales=0": "num_scales must be a whole number >= 1, got 0",
    "process.num_scales=1": "process.num_scales=1 leaves samplers no step between noise and image; choose 2 or more",
    "process=blurring process.num_scales=1": "process.num_scales=1 leaves samplers no step",
    "process.num_scales=2.5": "num_scales must be a whole number >= 1, got 2.5",
    "process=heat process.noise.noise_std=-0.1": "noise_std must be .*-0.1",
    "process=heat process.blur.blur_sigma_min=50": "blur_sigma_min=50 exceeds blur_sigma_max=24; swap them",
    "process=heat process.blur.blur_sigma_max=wide": "blur_sigma_max must be .*'wide'",
    "process=heat process.spectrum=wavelet": "unknown spectrum 'wavelet'",
    "process=ve process.noise.noise_min=-1": "noise_min",
    "process=vp process.noise.shift=0": "shift must be a positive number, got 0",
    "process=blurring process.min_decay=2": "min_decay",
    "process=vp process/noise=listed_beta process.num_scales=3 process.noise.betas=[0.1,0.2]": "betas",
    "process=vp process/noise=geometric": r"VP: signal\^2 \+ noise\^2 is",
    "process=blurring process/noise=constant": r"Blurring: signal\^2 \+ noise\^2 is",
    "process=blurring process/noise=edm": r"Blurring: signal\^2 \+ noise\^2 is",
    "process=vp process/noise=listed_beta": "process.noise.betas has no value yet; give it on the command line",
    "process=heat process/blur=listed_sigmas process.num_scales=3 process.blur.blur_sigmas=[3,2,1]": "sharpen at scale",
    "process=homogeneous target=noise": "needs noise, and Homogeneous has none",
    "process=heat target=finer sampler=heun sampler.grid=uniform": "sampler Heun looks at other scales than the next",
    "process=heat target=finer sampler=ddim sampler.steps=20": "target has learnt steps of 1/200 only, got steps=20",
    "process.num_scales=10 sampler=ddim sampler.steps=50": "steps=50 exceeds the process's num_scales=10; lower steps",
    "seed=-1": "seed must be a whole number >= 0 and <= 4.29497e.09, got -1",
    "seed=one": "seed must be a whole number .*'one'",
    "optimizer.learning_rate=-1": "optimizer.learning_rate must be a finite number >= 0, got -1",
    "optimizer.learning_rate=inf": "optimizer.learning_rate must be a finite number >= 0, got inf",
    "optimizer.weight_decay=inf": "optimizer.weight_decay must be a finite number >= 0, got inf",
    f"optimizer.warmup_steps={10**30}": r"optimizer.warmup_steps must be a whole number >= 0 and <= 1e\+09, got 10000",
    f"trainer.max_steps={10**30}": r"trainer.max_steps must be a whole number >= 1 and <= 1e\+09, got 10000",
    f"checkpoint.keep_last={10**30}": r"checkpoint.keep_last must be a whole number >= 1 and <= 9.22337e\+18, got 1000",
    "trainer.gradient_clip_val=inf": "trainer.gradient_clip_val must be a finite number >= 0, got inf",
    "optimizer.decay=cosin": "unknown optimizer.decay 'cosin': did you mean 'cosine'",
    "optimizer.betas=3": "optimizer.betas must be two numbers",
    "optimizer.betas=[0.9,inf]": "optimizer.betas must be two numbers",
    "objective=val/nothing": "objective=val/nothing is no figure of this run: did you mean 'val/loss'. allowed: ",
    "objective=null": "objective=None is no figure of this run",
    "objective=eval/fid": "objective=eval/fid is no figure .* need evaluation.every_n_steps",
    "ema.decay=abc": "ema.decay must be a number >= 0 and <= 1, got 'abc'",
    "checkpoint.every_n_steps=0": "checkpoint.every_n_steps must be a whole number >= 1 and <= 1e.09, got 0",
    "checkpoint.keep_last=0": "checkpoint.keep_last must be a whole number >= 1, got 0",
    "checkpoint.keep_last=all": "checkpoint.keep_last must be a whole number >= 1, got 'all'",
    "checkpoint.keep_best=-1": "checkpoint.keep_best must be a whole number >= 0, got -1",
    "checkpoint.keep_bets=1": "unknown option 'checkpoint.keep_bets': did you mean 'checkpoint.keep_best'",
    "check_resume=maybe": "check_resume must be true or false, got 'maybe'",
    "check_resume=true checkpoint.every_n_steps=6": "checkpoint.every_n_steps=6 must lie below trainer.max_steps=6",
    "samples.num_images=-1": "samples.num_images must be a whole number >= 0, got -1",
    "network.widths=[8,x]": "widths is .8, 'x'.; give a list",
    "conditional=true data.val_fraction=2": "val_fraction=2: allowed is 0 <= val_fraction < 1",
    "trainer.precision=bf8": "unknown trainer.precision 'bf8': did you mean 'bf16'",
    "trainer.precision=16-mixed": "trainer.precision=16-mixed overflows; use bf16-mixed or 32-true",
    "trainer.max_steps=0": "trainer.max_steps must be a whole number >= 1 and <= 1e.09, got 0",
    "trainer.max_steps=-1": "trainer.max_steps=-1 never ends; set trainer.max_time",
    "trainer.max_time=soon": "trainer: .*is not a valid duration",
    "trainer.val_check_interval=0": "trainer.val_check_interval must be a whole number >= 1 and <= 1e.09, got 0",
    "trainer.strategy=deepspeed": "trainer.strategy=deepspeed: allowed are auto, ddp .* and fsdp",
    "trainer=fsdp compile=true": "compile=true compiles a network in one piece",
    "trainer.gradient_clip_val=0": "trainer.gradient_clip_val=0 stops all learning; null clips nothing",
    "trainer.accelerator=gpu2": "trainer: .*invalid accelerator name",
    "trainer.devices=zero": "devices",
    "trainer.devices=1000000000": "trainer.devices=1000000000: allowed are at most 4096",
    f"data.seed={10**30}": r"seed must be a whole number >= 0 and <= 9.0072e\+15, got 1000",
    "data.num_workers=100000": "num_workers must be a whole number >= 0 and <= 1024, got 100000",
    "data=webdataset data.root=good data.val_root=": "data.val_root is empty",
    "data=webdataset data.root=good data.index=": "data.index is empty",
    "process.noise.logsnr_min=-2000": "process: math range error; one of its numbers is too large or too small",
    "process=heat process.noise.noise_std=1e200": "process: .*; one of its numbers is too large or too small",
    "data.batch_size=0": "batch_size=0: allowed is a whole number >= 1",
    "data.batch_size=5000": "data.batch_size=5000 exceeds the 1438 training images; set data.batch_size <= 1438",
    # places
    "data=folder": "data.root has no value yet; give it on the command line: KEY=VALUE",
    FOLDER + "data.root=nowhere": "nowhere: no such folder or zip archive",
    FOLDER + "data.root=empty": "empty: no images in it; allowed are files that end in",
    FOLDER + "data.root=file": "file: allowed are a folder and a .zip file",
    FOLDER + "data.root=mixed": r"mixed sizes, 000.png is \(12, 20\), 012.png \(16, 16\).*set image_size",
    FOLDER + "data.root=text data.on_error=raise": "text/005.png: cannot identify image file.*set on_error=skip",
    FOLDER + "data.root=cut data.on_error=raise": "cut/a.jpg: .*set on_error=skip",
    FOLDER + "data.root=good data.image_size=0": "image_size=0: allowed is a number of pixels >= 1",
    FOLDER + "data.root=good data.on_error=ignore": "unknown on_error='ignore': .*raise, skip",
    FOLDER + "data.root=bomb.zip data.image_size=8": "bomb.zip: a.png unpacks to .* as no image does",
    FOLDER + "data.root=outside.zip": "outside.zip: unsafe member path '../a.png'",
    FOLDER + "data.root=classes data.labels=folder data.on_error=raise": "1 class folders hold no readable image: eel",
    FOLDER + "data.root=good data.resize_mode=croop": "unknown resize_mode='croop': did you mean 'crop'",
    "data=photos conditional=true": "conditional=true needs labels, and this data set has none; choose another$",
    FOLDER + "data.root=good conditional=true": "conditional=true needs labels, and this data set has none",
    FOLDER + "data.root=good data.labels=folder": "lies in no class folder",
    "data=array data.path=floats.npy": "floats.npy: images are float64; save them as uint8",
    "data=mnist data.root=empty data.download=false": "MNIST is not in empty",
    "run_dir=file/run": "can't write to file/run: Not a directory; choose another folder",
    "run_dir=file": "can't write to file: .*; choose another folder",
    "run_dir=digits process=heat": "digits was trained with process=VP, and now process is InverseHeat",
    "run_dir=rotten": "rotten/checkpoints/last.ckpt is damaged: .* the SHA-256 .*; remove .* to start",
    "run_dir=older": "older/checkpoints/last.ckpt has model format 2; this version reads 3",
    "run_dir=strange": "the option 'data._target_=os.system' in strange/overrides.yaml asks for 'os.system'",
    "resume=nowhere": "resume=nowhere: no run there",
    "-m resume=digits process=vp,ve": "resume=DIR resumes one run at a time; repeat the command of the sweep",
    "-m check_resume=true seed=1,2": "check_resume=true checks one run; leave -m out",
    "-m ++check_resume=true": "check_resume=true checks one run; leave -m out",
    "--multirun check_resume=true,false": "check_resume=true checks one run; leave -m out",
}


@pytest.mark.parametrize("command", TRAIN)
def test_train(command: str, place: Path) -> None:
    before = listing(place)
    given = command.format(place=place).split(" ") if command.startswith(EXTRA) else command.split(" ")
    keys = {argument.split("=")[0] for argument in given}
    small = [argument for argument in SMALL if argument.split("=")[0] not in keys]
    run_dir = [] if keys & {"run_dir", "resume"} else ["run_dir=run"]
    assert_one_line(call("train.py", *small, *run_dir, *given, cwd=place), TRAIN[command])
    assert listing(place) == before and not (place / "run").exists() and not (place / "runs").exists()


def test_evaluation_needs_memory_for_its_samples(place: Path) -> None:
    options = ("evaluation.every_n_steps=2", "evaluation.features=efflite0", f"evaluation.num_samples={10**13}")
    outcome = call("train.py", *SMALL, *options, "run_dir=run", cwd=place)
    words = "features of evaluation.num_samples=10000000000000 samples would take .*; lower evaluation.num_samples"
    assert_one_line(outcome, words, status=1)
    assert not (place / "run").exists()


# --- sample.py --------------------------------------------------------------------------------------------------------

SAMPLE = {
    "out=out": "model has no value yet; give it on the command line",
    "model=digits": "out has no value yet; give it on the command line",
    "--config-dir nowhere model=digits out=out": "--config-dir nowhere: no such folder",
    "model=digits out=out num_samples=0": "num_samples must be a whole number >= 1, got 0",
    "model=digits out=out num_samples=-3": "num_samples must be a whole number >= 1, got -3",
    "model=digits out=out num_samples=few": "num_samples must be a whole number >= 1, got 'few'",
    "model=digits out=out num_sample=3": "unknown option 'num_sample': did you mean 'num_samples'",
    "model=digits out=out batch_size=0": "batch_size must be a whole number >= 1, got 0",
    "model=digits out=out seed=-1": "seed must be a whole number >= 0, got -1",
    "model=digits out=out trajectory=yess": "trajectory must be true or false, got 'yess'",
    "model=digits out=out size=[0,3]": r"size must be a number of pixels or \[height,width\], got \[0, 3\]",
    "model=digits out=out size=tall": "size must be a number of pixels",
    "model=heat out=out size=[16,16]": "starts from blurred training images of 8x8 pixels; it can't sample 16x16",
    "model=digits out=out steps=0": "steps must be a whole number >= 1 or null, got 0",
    "model=digits out=out steps=1001": "steps=1001 exceeds the process's num_scales=1000; lower steps",
    "model=heat out=out steps=5": "steps=5 exceeds the process's num_scales=4",
    "model=heat out=out sampler=heun steps=3": "karras grid needs noise that grows",
    "model=digits out=out sampler=ddmi": "unknown sampler 'ddmi': did you mean 'ddim'",
    "model=digits out=out sampler=ddim sampler.eta=2": "eta must lie in .0, 1., got 2",
    "model=digits out=out sampler=ddim sampler.grid=karas": "unknown grid 'karas': did you mean 'karras'",
    "model=digits out=out sampler=ddim sampler.etta=1": "unknown option 'sampler.etta': did you mean 'sampler.eta'",
    "model=digits out=out labels=3": "labels were given, but this model was trained without; drop labels=",
    "model=labels out=out labels=10": "unknown label 10; allowed: 0..9",
    "model=labels out=out labels=[1,cat]": "unknown label 'cat'; allowed: 0..9",
    "model=labels out=out labels=[]": "labels is empty",
    "model=digits out=out device=foo": "unknown device 'foo': allowed: auto, cpu, cuda",
    "model=digits out=out device=cuda:x": "device=cuda:x is not available here",
    "model=nowhere out=out": "no model at nowhere: no such file or folder",
    "model=good out=out": "no model in good: neither model/model.safetensors nor checkpoints/last.ckpt",
    "model=good/000.png out=out": "good/000.png is not a checkpoint of dpm_scales",
    "model=config.yaml out=out": "config.yaml is not a checkpoint of dpm_scales",
    "model=flipped out=out": "flipped/model.safetensors is damaged: its bytes do not have the SHA-256",
    "model=older/checkpoints/last.ckpt out=out": "last.ckpt has model format 2; this version reads 3",
    "model=rotten/checkpoints/last.ckpt out=out": "last.ckpt is damaged: its bytes do not have the SHA-256",
    "model=foreign.ckpt out=out": "foreign.ckpt is not a checkpoint of dpm_scales",
    "model=digits/model out=out weights=raw": "raw weights are in checkpoints only",
    "model=digits out=out weights=avg": "unknown weights 'avg'",
    "model=digits out=file": "can't write to file: .*; choose another folder",
    "model=digits out=file/out": "can't write to file/out: Not a directory; choose another folder",
    "model=digits out=good num_samples=3": "good holds images already .'000.png'., and no sample.json says that they",
    "model=digits out=good overwrite=true": "good holds '000.png', which overwrite=true does not replace",
    "model=digits out=out overwrite=1": "overwrite must be true or false, got 1",
    "model=labels out=out labels=1.5": "unknown label 1.5; allowed: 0..9",
    "model=labels out=out labels=true": "unknown label True; allowed: 0..9",
    "model=labels out=out num_samples=1000000000000": "1000000000000 images need as many files, and the disk of out",
    "model=labels out=out num_samples=1000000000000 shards=true": "the disk of out has room for at most",
    "model=digits out=out steps=1000000000000000000000": "exceeds the process's num_scales=1000; lower steps",
    "model=digits out=out seed=9223372036854775808": "seed must be a whole number >= 0 and <= 9.22337e.18, got 922",
    "model=labels out=out guidance=1e300": "guidance must be a number >= 0 and <= 1e.30, got 1e.300",
    "model=digits out=out device=cpu:99": "device=cpu:99 is not available here; use device=cpu",
    "model=digits out=out size=true": "size must be a number of pixels or .height,width., got True",
}


@pytest.mark.parametrize("command", SAMPLE)
def test_sample(command: str, place: Path) -> None:
    before = listing(place)
    assert_one_line(call("sample.py", *command.split(" "), cwd=place), SAMPLE[command])
    assert listing(place) == before and not (place / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_sample_on_a_device_that_is_not_there(place: Path) -> None:
    outcome = call("sample.py", "model=digits", "out=out", "device=cuda", cwd=place)
    assert_one_line(outcome, "device=cuda is not available here .*; use device=auto")


# --- what is no mistake -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "left"), [("text", 23), ("cut", 24)])
def test_unreadable_images_are_left_out_and_counted(folder: str, left: int, place: Path, tmp_path: Path) -> None:
    options = ("data=folder", f"data.root={place / folder}", "data.batch_size=4", "trainer.max_steps=1")
    with pytest.warns(UserWarning, match="1 unreadable images are left out: (005.png|a.jpg)"):
        train(tmp_path / "run", *options, "data.val_fraction=0.0")
    outcome = call("train.py", *SMALL, *options, "data.val_fraction=0.0", f"run_dir={tmp_path / 'again'}", cwd=tmp_path)
    assert f"{left} + 0 images of 12x20x3" in outcome.out


def test_an_object_takes_the_place_of_another(tmp_path: Path) -> None:
    """Hydra would merge the two."""
    blur = "process.blur={_target_:dpm_scales.schedules.ListedBlurSigmas,blur_sigmas:[0.5,1,2]}"
    run_dir = train(tmp_path / "run", "process=heat", "process.num_scales=3", blur, "sampler.steps=null")
    assert settings(run_dir)["process"]["blur"] == {
        "_target_": "dpm_scales.schedules.ListedBlurSigmas",
        "blur_sigmas": [0.5, 1, 2],
    }
    assert call("train.py", f"run_dir={run_dir}", "trainer.max_steps=7", cwd=tmp_path).status == 0


@pytest.mark.parametrize("name", ["process=heat,seed=1", "my run", "it's", "a[1](b)", "~x;y"])
def test_folders_may_have_any_name(name: str, tmp_path: Path) -> None:
    """Those that runs get by themselves, too, without quotes for Hydra's grammar."""
    outcome = call("train.py", *SMALL, "trainer.max_steps=1", f"run_dir={name}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert settings(tmp_path / name)["run_dir"] == name
    outcome = call("train.py", f"resume={name}", cwd=tmp_path)
    assert outcome.status == 0 and "is finished (1 steps)" in outcome.out
    outcome = call("sample.py", f"model={name}", f"out={name}/out", "num_samples=1", cwd=tmp_path)
    assert outcome.status == 0 and (tmp_path / name / "out" / "000000.png").is_file()


def test_damaged_options_of_a_run_are_told(place: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(place / "digits", tmp_path / "run"))
    for text in ("{", "3", "\x00"):
        (copied / "overrides.yaml").write_text(text)
        outcome = call("train.py", f"run_dir={copied}", cwd=tmp_path)
        assert_one_line(outcome, "overrides.yaml is damaged; remove it and give the run's options again")


# --- helpers ----------------------------------------------------------------------------------------------------------


def test_tidy() -> None:
    assert tidy(["a=1", "-m", "b=2"]) == ["-m", "a=1", "b=2"]
    assert tidy(["run_dir=a=b", "data.root=a,b", "out='a b'", "model=null"]) == [
        "run_dir='a=b'",
        "data.root='a,b'",
        "out='a b'",
        "model=null",
    ]
    assert tidy(["data.root=${oc.env:HOME}", "model=it's"]) == ["data.root=${oc.env:HOME}", 'model="it\'s"']
    assert tidy(["--multirun", "model=a,b"]) == ["--multirun", "model=a,b"]
    assert tidy(["process.blur={_target_:A,b:1}"]) == ["~process.blur", "+process.blur={_target_:A,b:1}"]
    assert tidy(["+process.blur={_target_:A}", "x={a:1}"]) == ["+process.blur={_target_:A}", "x={a:1}"]
    replaced = ["~process", "+process={_target_:A}"]  # before what is within it, in any order
    assert tidy(["process.n=2", "a=1", "process={_target_:A}"]) == [*replaced, "++process.n=2", "a=1"]
    inner = tidy(["process={_target_:A}", "process.blur={_target_:B}"])
    assert inner == [*replaced, "++process.blur={_target_:B}"] == tidy(inner)


def test_suggestions() -> None:
    assert suggest("haet", ["vp", "heat"]) == "did you mean 'heat'? allowed: heat, vp"
    assert suggest("MNIST2", ["mnist"]) == "did you mean 'mnist'? allowed: mnist"
    assert suggest("zzz", ["vp"]) == "allowed: vp"


@pytest.mark.parametrize("value", [True, None, "1", float("nan"), float("inf"), 0, 11])
def test_numbers_out_of_range(value: object) -> None:
    with pytest.raises(UserError, match=r"^x must be a number >= 1 and <= 10, got "):
        require_number("x", value, 1, 10)
    with pytest.raises(UserError, match="^x must be a whole number >= 1, got 2.5$"):
        require_number("x", 2.5, 1, whole=True)
    for endless in (-float("inf"), float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"^x must be a finite number, got {endless}$"):
            require_number("x", endless)
    with pytest.raises(UserError, match=r"^x must be a finite number <= 9.22337e\+18, got 10{97}"):
        require_number("x", 10**400)
    require_number("x", 2.5, 1, 10)
    require_number("x", 1, 1, whole=True)


# --- in a process of its own ------------------------------------------------------------------------------------------


def test_a_real_process_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    """What a shell sees of a mistake; the entry points differ in no line of what brings it there."""
    outcome = run("sample.py", "model=nowhere", "out=out", cwd=tmp_path)
    assert_one_line(outcome, SAMPLE["model=nowhere out=out"])
    assert outcome.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mistake", ["process.num_scales=0", "process=haet", "sede=1"])
def test_tracebacks_on_request(mistake: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="num_scales must be|Could not find 'process/haet'|Could not override 'sede'"):
        call("train.py", mistake, cwd=tmp_path, environment={"HYDRA_FULL_ERROR": "1"})


def test_defects_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("dpm_scales.training.run.fit_to_data", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        call("train.py", *SMALL, "run_dir=run", cwd=tmp_path)
    assert not (tmp_path / "run").exists()
