"""What the recipes over the shapes world share: how a model is measured there, and what is hard to learn."""

SIZE = {"height": 48, "width": 48}
# Weights of what is learned last, for `data` of a flow stage.
HARD = {"position": 4.0, "color_attr": 3.0, "two_object": 2.0, "counting": 2.0, "move": 6.0, "arrange": 6.0}


def evaluations(num_prompts: int, samples: int, num_steps: int = 20, guidance_scale: float = 1.0) -> dict:
    """Both tasks on held-out combinations with fixed seeds, without guidance: it would hide much of what there is to learn."""
    shared = {**SIZE, "num_prompts": num_prompts, "samples": samples, "num_steps": num_steps, "seed": 1000}
    return {
        task: {
            "source": {"kind": "shapes", "task": task, "split": "heldout"},
            "rewards": {f"shapes_{task}": {}},
            "guidance_scale": guidance_scale,
            "batch_size": 100,
            **shared,
        }
        for task in ("t2i", "edit")
    }
