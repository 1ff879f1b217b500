"""The networks of the papers and the learned weight with DDP and FSDP: the run is that of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from support.cluster_shell import Forked, job_step
from support.networks import TOY
from support.shell import FAST, SMALL, call, checkpoint, column

RUN = (*(option for option in SMALL if not option.startswith("network.")), *FAST, "weight=learned")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["edm2", "jit"])
def test_two_ranks_train_as_one_does(network: str, tmp_path: Path) -> None:
    options = (*RUN, *TOY[network], "conditional=true", "trainer.max_steps=4")
    end = call("train.py", *options, "data.batch_size=32", "run_dir=alone", cwd=tmp_path)
    assert end.status == 0, end.err
    alone = checkpoint(tmp_path / "alone")
    for strategy in ("ddp", "fsdp"):
        ends = Forked(
            *(job_step(2), *options, f"trainer={strategy}", "data.batch_size=16", f"run_dir={strategy}"), cwd=tmp_path
        ).finish()
        assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
        found = checkpoint(tmp_path / strategy)
        for key in ("state_dict", "current_model_state"):
            assert found[key].keys() == alone[key].keys()
            for name, value in alone[key].items():
                torch.testing.assert_close(found[key][name], value, rtol=1e-2, atol=1e-3, msg=f"{strategy} {name}")
        for name in ("train/loss", "train/grad_norm"):
            ours, theirs = column(tmp_path / strategy, name), column(tmp_path / "alone", name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=f"{strategy} {name}")
