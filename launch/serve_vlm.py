"""Serves a Qwen2.5-VL behind an OpenAI-compatible chat endpoint.

    python -m launch.serve_vlm --model=unipic2_jax/assets/tiny_metaquery --port=8000
    curl http://127.0.0.1:8000/v1/models

`--model` as for `launch.chat`. Its base URL is the first line that is printed. SIGTERM lets it finish what it has begun.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from launch import cli

MODEL = flags.DEFINE_string("model", None, "Qwen2.5-VL folder or hub id, or the folder of a MetaQuery model.")
NAME = flags.DEFINE_string("name", "", "Name that clients ask for; by default the folder's.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's.")
PORT = flags.DEFINE_integer("port", 0, "Port to listen on; 0: a free one.", lower_bound=0, upper_bound=65535)
API_KEY_ENV = flags.DEFINE_string("api_key_env", "", "Environment variable with the key that clients must send.")
DTYPE = cli.dtype_flag()
flags.mark_flag_as_required("model")


def main(argv: list[str]) -> None:
    del argv
    from unipic2_jax.core.keys import read_key
    from unipic2_jax.pipelines.chat import ChatModel
    from unipic2_jax.serving.chat import make_server

    key = read_key(API_KEY_ENV.value, "server")
    model = ChatModel.load(MODEL.value, DTYPE.value)
    name = NAME.value or Path(MODEL.value).name
    server = make_server(model, name, host=HOST.value, port=PORT.value, key=key)
    print(f"{server.url}/v1", flush=True)
    print(f"{name}: {model.description}", file=sys.stderr)
    server.run_until_signal()


if __name__ == "__main__":
    cli.run(main)
