"""Indexes, shards, links and folders."""

from __future__ import annotations

import shutil

from broken.damage import combine, content, json_file, link, pipe
from broken.models import INDEX, NORM, WEIGHTS
from broken.registry import Damage, case

# ---- index and shards ------------------------------------------------------------------------------

FIRST = "diffusion_pytorch_model-00001-of-00002.safetensors"


def mapped(value: object) -> Damage:
    return json_file(INDEX, lambda index: index["weight_map"].update({NORM: value}))


for _label, _name in {
    "parent": f"../{FIRST}",
    "absolute": "/etc/passwd",
    "hidden_parent": f"x/../../{FIRST}",
    "drive": f"C:\\{FIRST}",
    "backslash": f"..\\{FIRST}",
    "share": f"\\\\host\\share\\{FIRST}",
    "nul": f"{FIRST}\0",
    "nothing": "",
    "itself": ".",
}.items():
    case(
        f"index_{_label}", "sharded", f"a shard named {_name!r}".replace("|", "/"), mapped(_name), "E-CKP-03"
    )
case("index_shard_missing", "sharded", "a missing shard", lambda f: (f / FIRST).unlink(), "E-CKP-03")
case(
    "index_names_missing",
    "sharded",
    "a name without a file",
    mapped("model-00009-of-00009.safetensors"),
    "E-CKP-03",
)
case(
    "index_shard_is_folder",
    "sharded",
    "a shard that is a folder",
    combine(lambda f: (f / FIRST).unlink(), lambda f: (f / FIRST).mkdir()),
    "E-CKP-03",
)
case("index_shard_loop", "sharded", "a shard that is a link to itself", link(FIRST, FIRST), "E-CKP-03")
case(
    "index_other_shard",
    "sharded",
    "a tensor mapped to the wrong shard",
    json_file(
        INDEX,
        lambda i: i["weight_map"].update(
            {n: FIRST for n in i["weight_map"]} | {NORM: FIRST.replace("00001", "00002", 1)}
        ),
    ),
    "E-CKP-04",
)
case(
    "index_lacks_tensor",
    "sharded",
    "a tensor that the index does not name",
    json_file(INDEX, lambda i: i["weight_map"].pop(NORM)),
    "E-CKP-04",
)
case("index_number", "sharded", "a shard that is a number", mapped(3), "E-CKP-06")
case(
    "index_no_map",
    "sharded",
    "an index without weight_map",
    json_file(INDEX, lambda i: i.pop("weight_map")),
    "E-CKP-06",
)
case(
    "index_map_list",
    "sharded",
    "a weight_map that is a list",
    json_file(INDEX, lambda i: i.update(weight_map=[])),
    "E-CKP-06",
)
case("index_not_json", "sharded", "an index that is not JSON", content(INDEX, "{"), "E-CKP-06")
case("index_deep", "sharded", "an index nested 100,000 deep", content(INDEX, "[" * 100_000), "E-CKP-06")
case(
    "index_twice",
    "sharded",
    "a duplicate tensor name",
    lambda f: content(
        INDEX,
        (f / INDEX)
        .read_text()
        .replace('"weight_map": {', f'"weight_map": {{"{NORM}": "elsewhere.safetensors", ', 1),
    )(f),
    "E-CKP-06",
)
case(
    "index_and_single",
    "sharded",
    "shards and a single file",
    lambda f: content(WEIGHTS, (f / FIRST).read_bytes())(f),
    "E-CKP-03",
)
case(
    "shard_truncated",
    "sharded",
    "the second shard is cut",
    lambda f: content(
        FIRST.replace("00001", "00002", 1), (f / FIRST.replace("00001", "00002", 1)).read_bytes()[:-9]
    )(f),
    "E-CKP-02",
)

# ---- folders ---------------------------------------------------------------------------------------

case("nothing_there", "", "a path that does not exist", lambda f: None, "E-USE-02", source="nowhere")
case("folder_empty", "", "an empty folder", lambda f: None, "E-CKP-01")
case("folder_of_text", "", "a folder of other files", content("README.md", "# hello"), "E-CKP-01")
case(
    "file_of_text",
    "",
    "a file that is not safetensors",
    content("a.txt", "hello"),
    "E-CKP-01",
    source="a.txt",
)
case("folder_loop", "", "a link to itself", lambda f: (f / "a").symlink_to("a"), "E-USE-02", source="a")
case(
    "cascade_one_expert",
    "cascade",
    "one of two experts",
    lambda f: shutil.rmtree(f / "low_noise_model"),
    "E-CKP-02",
)
case(
    "cascade_empty_expert",
    "cascade",
    "an expert without weights",
    lambda f: (f / "low_noise_model" / WEIGHTS).unlink(),
    "E-CKP-02",
)
case(
    "pipeline_not_json",
    "pipeline",
    "model_index.json is not JSON",
    content("model_index.json", "{"),
    "E-CKP-06",
)
case(
    "pipeline_other_class",
    "pipeline",
    "another pipeline",
    json_file("model_index.json", lambda i: i.update(_class_name="FluxPipeline")),
    "E-CKP-05",
)
case(
    "pipeline_class_list",
    "pipeline",
    "a pipeline that is a list",
    json_file("model_index.json", lambda i: i.update(_class_name=[])),
    "E-CKP-05",
)
case(
    "pipeline_no_transformer",
    "pipeline",
    "no transformer named",
    json_file("model_index.json", lambda i: [i.pop("transformer"), i.pop("transformer_2")]),
    "E-CKP-02",
)
case(
    "pipeline_part_outside",
    "pipeline",
    "a part ../x",
    json_file("model_index.json", lambda i: i.update({"../x": ["diffusers", "AutoencoderKLWan"]})),
    "E-CKP-03",
)
case(
    "pipeline_part_missing",
    "pipeline",
    "a part without its folder",
    json_file("model_index.json", lambda i: i.update(image_encoder=["transformers", "CLIPVisionModel"])),
    "E-CKP-02",
)
case("pipeline_part_loop", "pipeline", "a part that is a link to itself", link("vae", "vae"), "E-CKP-02")
case(
    "pipeline_other_transformer",
    "pipeline",
    "a transformer of another class",
    json_file("model_index.json", lambda i: i.update(transformer=["diffusers", "FluxTransformer2DModel"])),
    "E-CKP-05",
)

# ---- not regular files ------------------------------------------------------------------------------

case("pipe_weights", "single", "a named pipe in place of the weights", pipe(WEIGHTS), "E-CKP-02")
case("pipe_shard", "sharded", "a named pipe in place of a shard", pipe(FIRST), "E-CKP-03")
case("pipe_config", "single", "a named pipe in place of config.json", pipe("config.json"), "E-CKP-06")
case("pipe_index", "sharded", "a named pipe in place of the index", pipe(INDEX), "E-CKP-06")
case("zeros_weights", "single", "weights that link to /dev/zero", link(WEIGHTS, "/dev/zero"), "E-CKP-02")
case(
    "zeros_config",
    "single",
    "a config.json that links to /dev/zero",
    link("config.json", "/dev/zero"),
    "E-CKP-06",
)
