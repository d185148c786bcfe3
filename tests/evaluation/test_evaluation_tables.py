"""The ablation tables: the paper's rows in their order beside means with intervals."""

import numpy as np
import pytest
from PIL import Image

from configs import ablations
from unipic2_jax.evaluation.tables import EDIT_SCORE, T2I_SCORE, TABLES, markdown, mean_interval, plot
from unipic2_jax.training.config import validate


def test_the_interval_is_students():
    mean, half = mean_interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.30265 * 0.1 / np.sqrt(3), rel=1e-4)
    with pytest.raises(ValueError, match="run more"):
        mean_interval([0.5])


@pytest.mark.parametrize("number", [2, 3])
def test_a_table_has_the_papers_rows_beside_ours(number, tmp_path):
    table = TABLES[number]
    scores = {
        row.variant: {EDIT_SCORE: [0.1 * i, 0.1 * i + 0.02], T2I_SCORE: [0.5, 0.6]}
        for i, row in enumerate(table.rows, 1)
    }
    lines = markdown(table, scores).splitlines()
    assert len(lines) == 2 + len(table.rows) and len({line.count("|") for line in lines}) == 1
    for i, (row, line) in enumerate(zip(table.rows, lines[2:]), 1):
        assert line.startswith(f"| {i} | ") and f"{0.1 * i + 0.01:.3f} ± " in line
        assert all(f"{figure:.2f}" in line for figure in row.paper.values())
    plot(table, scores, tmp_path / "table.png")
    with Image.open(tmp_path / "table.png") as picture:
        assert picture.width > 400 and len(picture.getcolors(1 << 24)) > 10


def test_every_row_has_a_recipe():
    for table in TABLES.values():
        for row in table.rows:
            config = validate(ablations.get_config(f"{row.variant},somewhere"))
            assert config.schedule == (row.variant,)
            path, trainable = ablations.VARIANTS[row.variant]
            assert (
                config.settings.get("reference_path") == path
                and config.stages[row.variant].optimizer.trainable == trainable
            )
    with pytest.raises(ValueError, match="no run 'neither'"):
        ablations.get_config("neither")
