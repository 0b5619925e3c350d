"""`fastft plan --no-device`: Aurora's forward and backward on tensors without values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_plan_without_a_gpu(weather_run: str, fastft: Callable[..., Any]) -> None:
    # Over a roll-out, each block is called several times.
    overrides = [f"model.options.arguments.{part}coder_depths=[1,1]" for part in ("en", "de")]
    overrides += ["model.options.rollout_steps=2"]
    outcome = fastft("plan", weather_run, "--no-device", "--budget", "8GB", *overrides)
    assert (outcome.errors, outcome.code) == ("", 0)
    assert "11 blocks, batch of 2, bf16" in outcome.output
    plan = json.loads(Path("run/plan/plan-8GB.json").read_text())
    names = [f"backbone.{part}coder_layers.{i}.blocks.0" for part in ("en", "de") for i in (0, 1)]
    names += ["backbone.encoder_layers.0.downsample", "backbone.decoder_layers.0.upsample"]
    names += ["encoder.surf_mlp", "encoder.level_agg", "decoder"]
    names += ["encoder.surf_token_embeds", "encoder.atmos_token_embeds"]
    assert plan["ways"] == dict.fromkeys(names, "keep all")
    assert plan["predicted_bytes"] > 0
    assert Path("run/plan/memory.png").is_file()
