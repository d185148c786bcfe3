"""The ablation tables: the paper's rows in their order beside means with intervals."""

import numpy as np
import pytest
from PIL import Image

from configs import ablations
from unipic2_jax.reproduction.tables import BASE, TABLES, markdown, mean_interval, plot
from unipic2_jax.training.config import validate


def test_the_interval_is_students():
    mean, half = mean_interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.30265 * 0.1 / np.sqrt(3), rel=1e-4)
    with pytest.raises(ValueError, match="run more"):
        mean_interval([0.5])


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_table_has_the_papers_rows_beside_ours(number, tmp_path):
    table = TABLES[number]
    values = {score: [0.1, 0.12] for score in table.benchmarks.values()}
    scores = {
        row.variant: {
            score: [v * i for v in found[: 1 if row.variant == BASE else 2]] for score, found in values.items()
        }
        for i, row in enumerate(table.rows, 1)
    }
    lines = markdown(table, scores).splitlines()
    assert len(lines) == 2 + len(table.rows) and len({line.count("|") for line in lines}) == 1
    for i, (row, line) in enumerate(zip(table.rows, lines[2:]), 1):
        ours = f"{0.1 * i:.3f} |" if row.variant == BASE else f"{0.11 * i:.3f} ± "
        assert line.startswith(f"| {i} | ") and line.count(ours) == len(table.benchmarks)
        assert all(f"{figure:.2f}" in line for figure in row.paper.values())
    plot(table, scores, tmp_path / "table.png")
    with Image.open(tmp_path / "table.png") as picture:
        assert picture.width > 400 and len(picture.getcolors(1 << 24)) > 10


def test_every_row_has_a_recipe():
    for number in (2, 3):
        for row in TABLES[number].rows:
            config = validate(ablations.get_config(f"{row.variant},somewhere"))
            assert config.schedule == (row.variant,)
            path, trainable = ablations.VARIANTS[row.variant]
            assert (
                config.settings.get("reference_path") == path
                and config.stages[row.variant].optimizer.trainable == trainable
            )
    tasks = {"joint": ("joint",), "judge": ("edit",), "judge_geneval": ("t2i",), "geneval_editreward": ("edit",)}
    for row in TABLES[4].rows:
        if row.variant != BASE:
            config = validate(ablations.get_config(f"{row.variant},somewhere"))
            assert config.schedule == tasks.get(row.variant, config.schedule)
            trained = {task for task in ("edit", "t2i") if row.label[1 if task == "t2i" else 2] == "x"}
            before = ablations.run_before(row.variant)
            stages = [*config.schedule, *(validate(ablations.get_config(f"{before},x")).schedule if before else ())]
            assert set(stages) in (trained, {"joint"})
    with pytest.raises(ValueError, match="no run 'neither'"):
        ablations.get_config("neither")
