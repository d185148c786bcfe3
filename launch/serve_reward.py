"""Serves a reward over HTTP, for `kind='remote'` of a run elsewhere.

    python -m launch.serve_reward --reward=shapes_t2i --port=18100
    python -m launch.serve_reward --reward=judge --options='{"base_url": "http://gpu1:8000/v1", "model": "m", "api_key_env": ""}'
    python -m launch.serve_reward --import=my_rewards --reward=bright

Its address is the first line that is printed. SIGTERM lets it finish what it has begun.
"""

from __future__ import annotations

import importlib
import json

from absl import flags

from launch import cli

REWARD = flags.DEFINE_string("reward", None, "Kind of the reward.")
IMPORT = flags.DEFINE_multi_string("import", [], "Module that registers rewards; may be given several times.")
OPTIONS = flags.DEFINE_string("options", "{}", "Its options, as a JSON object; those of its calls too.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's.")
PORT = flags.DEFINE_integer("port", 0, "Port to listen on; 0: a free one.", lower_bound=0, upper_bound=65535)
API_KEY_ENV = flags.DEFINE_string("api_key_env", "", "Environment variable with the key that clients must send.")
MAX_MEGABYTES = flags.DEFINE_integer("max_megabytes", 256, "Largest request.", lower_bound=1)
flags.mark_flag_as_required("reward")


def main(argv: list[str]) -> None:
    del argv
    from unipic2_jax.core.keys import read_key
    from unipic2_jax.serving.reward import make_server
    from unipic2_jax.serving.server import MEGABYTE

    try:
        options = json.loads(OPTIONS.value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--options is not JSON ({error}); write an object like '{{\"strict_weight\": 1}}'."
        ) from error
    for name in IMPORT.value:
        try:
            importlib.import_module(name)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"--import={name} cannot be imported ({error}); name a module on the path.") from error
    server = make_server(
        REWARD.value,
        options,
        host=HOST.value,
        port=PORT.value,
        max_bytes=MAX_MEGABYTES.value * MEGABYTE,
        key=read_key(API_KEY_ENV.value, "server"),
    )
    print(server.url, flush=True)
    server.run_until_signal()


if __name__ == "__main__":
    cli.run(main)
