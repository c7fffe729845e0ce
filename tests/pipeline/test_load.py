"""`ascendit.load` with quantized folders and recipes: results, equality, early errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

import ascendit
from ascendit.checkpoint.layout import recognise
from ascendit.errors import CheckpointError, EnvironmentProblem, RequestError, UsageError
from ascendit.model.linear import QuantLinear
from ascendit.pipeline.images import name_image

PROMPT = "a red circle moves right on a black background"
KINDS = ["t2v_cascade", "t2v_single", "ti2v", "ti2v_image", "i2v_cascade", "i2v_21"]


def video(pipe: Any, **kw: Any) -> np.ndarray:
    return pipe.generate(PROMPT, seed=3, num_inference_steps=2, **kw).frames


def image_for(pipe: Any) -> dict[str, Any]:
    needs_image = pipe.defaults.task == "i2v"
    return {"image": torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))} if needs_image else {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8", "mxfp8", "mxfp4_dualscale"])
def test_online_equals_offline_for_every_kind_of_model(kind, scheme, tiny_folder, tmp_path):
    force = kind.startswith("ti2v")
    ascendit.quantize(tiny_folder(kind), tmp_path / "q", scheme=scheme, force=force)
    online = ascendit.load(tiny_folder(kind), scheme=scheme, force=force)
    offline = ascendit.load(tmp_path / "q")
    for a, b in zip(online.experts.values(), offline.experts.values(), strict=True):
        ours, theirs = a.state_dict(), b.state_dict()
        assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert any(isinstance(m, QuantLinear) and m.scheme == scheme for m in a.modules())
    shape = dict(height=64, width=64, num_frames=5)
    name, pixels = name_image(image_for(online).get("image"))
    request = online.request(PROMPT, image=name, seed=3, num_inference_steps=2, **shape)
    outs = [pipe.run(request, pixels=pixels) for pipe in (online, offline)]
    assert np.array_equal(outs[0].frames, outs[1].frames)


@pytest.fixture(scope="module")
def mxfp4() -> Any:
    return ascendit.load("demo", scheme="mxfp4")


def test_one_pipeline_makes_two_sizes_with_and_without_guidance(mxfp4):
    first = video(mxfp4)
    other = video(mxfp4, num_frames=13)
    assert other.shape == (13, 64, 64, 3) and np.array_equal(video(mxfp4), first)
    plain = video(mxfp4, guidance_scale=1.0, guidance_scale_2=1.0)
    assert plain.shape == first.shape and not np.array_equal(plain, first)


def test_a_step_policy_changes_only_its_steps(mxfp4):
    w4a4 = video(mxfp4)
    assert np.array_equal(video(ascendit.load("demo", scheme="mxfp4", step_policy="default:w4a4")), w4a4)
    mixed = ascendit.load("demo", scheme="mxfp4", step_policy="0:w4a8,default:w4a4")
    all_8 = ascendit.load("demo", scheme="mxfp4", step_policy="default:w4a8")
    floats = ascendit.load("demo", scheme="mxfp4", step_policy="default:bf16")
    a, b, c = video(mixed), video(all_8), video(floats)
    assert not np.array_equal(a, w4a4) and not np.array_equal(a, b)
    assert np.array_equal(c, video(ascendit.load("demo")))
    plain = {n for n, m in mxfp4.transformer.named_modules() if isinstance(m, QuantLinear)}
    assert {n for n, m in mixed.transformer.named_modules() if isinstance(m, QuantLinear)} == plain
    with pytest.raises(RequestError, match="names step 0|names step 1") as e:
        ascendit.load("demo", scheme="mxfp4", step_policy="1:w4a8").generate(PROMPT, num_inference_steps=1)
    assert e.value.code == "E-REQ-03"


def test_the_step_policy_of_a_recipe_is_stored_in_the_folder(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('step_policy = "0:w4a8"\n[[rules]]\nlayers = "*"\nscheme = "mxfp4"\n')
    ascendit.quantize("demo", tmp_path / "q", recipe=str(recipe))
    online, offline = ascendit.load("demo", recipe=str(recipe)), ascendit.load(tmp_path / "q")
    assert str(online.policy) == str(offline.policy) == "0:w4a8"
    assert np.array_equal(video(online), video(offline))
    assert str(ascendit.load(tmp_path / "q", step_policy="default:w4a4").policy) == "default:w4a4"


def test_experts_whose_recipes_differ(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    ascendit.quantize("demo", a, scheme="mxfp8", copy=True)
    ascendit.quantize("demo", b, scheme="mxfp4", keep=["blocks.0.*"], copy=True)
    (a / "transformer_2").rename(tmp_path / "old")
    (b / "transformer_2").rename(a / "transformer_2")
    pipe = ascendit.load(a)
    schemes = [{m.scheme for m in e.modules() if isinstance(m, QuantLinear)} for e in pipe.experts.values()]
    assert schemes == [{"mxfp8"}, {"mxfp4"}] and video(pipe).shape[0] == 17


@pytest.mark.parametrize(
    ("options", "error", "code", "text"),
    [
        ({"scheme": "mxfp8", "device": "twin:a2"}, EnvironmentProblem, "E-CAP-01", "scheme mxfp8 on twin:a2"),
        ({"scheme": "mxfp6"}, UsageError, "E-USE-01", "mxfp6"),
        ({"recipe": "nope"}, UsageError, "E-USE-02", "nope"),
        ({"scheme": "mxfp8", "keep": ["blocks.99.*"]}, UsageError, "E-USE-05", "blocks.99"),
        ({"keep": ["blocks.0.*"]}, UsageError, "E-USE-01", "without a scheme"),
        ({"scheme": "mxfp8", "step_policy": "0:w4a8"}, UsageError, "E-USE-01", "no layer is in mxfp4"),
        ({"step_policy": "0:w4a9"}, UsageError, "E-USE-01", "w4a9"),
        ({"step_policy": 5}, UsageError, "E-USE-01", "it has type int, not text"),
        ({"step_policy": "0:bf16"}, UsageError, "E-USE-01", "no layer is quantized"),
        ({"scheme": "mxfp8", "activation_rule": 7}, UsageError, "E-USE-01", "activation_rule=7"),
        ({"scheme": "mxfp8", "keep": "blocks.99.*"}, UsageError, "E-USE-05", "blocks.99"),
        ({"scheme": "mxfp8", "emulate": "sometimes"}, UsageError, "E-USE-01", "sometimes"),
        ({"scheme": "mxfp4", "activation_rule": "mxfp4=rceil"}, UsageError, "E-USE-01", "rceil"),
        ({"scheme": "mxfp4", "activation_rule": "mxfp8=floor"}, UsageError, "E-USE-01", "for mxfp8, which"),
        ({"activation_rule": "mxfp4=max:7"}, UsageError, "E-USE-01", "for mxfp4, which no layer"),
    ],
)
def test_mistakes_are_refused_before_a_weight_is_read(options, error, code, text):
    events: list[object] = []
    with pytest.raises(error) as e:
        ascendit.load("demo", on_progress=events.append, **options)
    assert e.value.code == code and text in e.value.got and not events


def test_quantizing_twice_and_fp4_on_ti2v_without_force_are_refused(tmp_path, tiny_folder):
    ascendit.quantize("demo", tmp_path / "q", scheme="mxfp8")
    for scheme in ("int8", "bf16"):
        with pytest.raises(UsageError, match="already quantized") as e:
            ascendit.load(tmp_path / "q", scheme=scheme)
        assert e.value.code == "E-QNT-01"
    with pytest.raises(UsageError, match="W4A4") as e:
        ascendit.load(tiny_folder("ti2v"), scheme="mxfp4")
    assert e.value.code == "E-QNT-02" and "force=True" in e.value.fix


def test_a_missing_scale_and_a_manifest_of_another_model_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    ascendit.quantize("demo", tmp_path / "q", scheme="mxfp8", copy=True)
    file = next((tmp_path / "q" / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "blocks.3.attn1.to_k.weight_scale"}, file)
    with pytest.raises(CheckpointError, match="blocks.3.attn1.to_k") as e:
        ascendit.load(tmp_path / "q")
    assert e.value.code in ("E-CKP-04", "E-CKP-07", "E-CKP-08")
    save_file(tensors, file)
    ascendit.quantize("demo", tmp_path / "other", scheme="mxfp4", copy=True)
    manifest = "transformer/quant_model_description.json"
    (tmp_path / "q" / manifest).write_bytes((tmp_path / "other" / manifest).read_bytes())
    with pytest.raises(CheckpointError) as e:
        ascendit.load(tmp_path / "q")
    assert e.value.code == "E-CKP-07"


def test_a_tiled_fp8_checkpoint_loads_as_bf16(tmp_path):
    from ascendit import mx

    source = tiny.copy(tiny.build_t2v_single(tmp_path / "m", dtype=torch.bfloat16), tmp_path / "fp8")
    from safetensors.torch import load_file, save_file

    file = source / "transformer" / tiny.WEIGHTS
    tensors = load_file(file)
    name = "blocks.0.ffn.net.2.weight"
    qdata, scale = (tensors[name].float() * 100).to(torch.float8_e4m3fn), torch.full((1, 1), 0.01)
    e = mx.Encoded(qdata, scale, None, "fp8_128x128", -1, tuple(qdata.shape))
    save_file(tensors | {name: qdata, f"{name}_scale_inv": scale}, file)
    model: Any = ascendit.load(source).transformer
    expected = mx.decode(e, torch.bfloat16)
    assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight, expected)
    online = ascendit.load(source, scheme="int8").transformer
    layer = online.get_submodule(name.removesuffix(".weight"))
    assert isinstance(layer, QuantLinear) and torch.equal(
        layer.state_dict()["weight"], mx.encode(expected, "int8").qdata
    )


def test_a_repacked_folder_makes_the_same_video(tmp_path):
    ascendit.quantize("demo", tmp_path / "q", scheme="mxfp4", engine="vllm-omni")
    ascendit.repack(tmp_path / "q", tmp_path / "r")
    a, b = ascendit.load(tmp_path / "q"), ascendit.load(tmp_path / "r")
    assert recognise(tmp_path / "q").kind == "diffusers"
    assert np.array_equal(video(a), video(b)) and np.array_equal(
        video(a), video(ascendit.load("demo", scheme="mxfp4"))
    )


def test_the_vae_in_bfloat16_is_near_the_one_in_float32():
    float32, bfloat16 = (video(ascendit.load("demo", vae_dtype=d)).astype(float) for d in (None, "bfloat16"))
    assert 50 < 10 * np.log10(255**2 / np.square(float32 - bfloat16).mean()) < 90


def test_a_refused_cast_changes_nothing(mxfp4):
    before = {n: (p.dtype, p.device) for n, p in mxfp4.transformer.named_parameters()}
    for cast in (lambda m: m.half(), lambda m: m.to("meta"), lambda m: m.double()):
        with pytest.raises(UsageError) as e:
            cast(mxfp4.transformer)
        assert e.value.code == "E-QNT-03"
    assert {n: (p.dtype, p.device) for n, p in mxfp4.transformer.named_parameters()} == before
