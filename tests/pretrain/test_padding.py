"""The loss with padding in it: what is counted, and that it can only look lower."""

import csv
import dataclasses

import jax.numpy as jnp
import numpy as np

from experiments.pretrain import data, padding, side


def test_targets_of_text_end_with_the_first_end_token():
    end = 9
    tokens = jnp.array([[9, 1, 2, 9, 9, 9], [9, 1, 9, 2, 3, 4], [9, 9, 9, 9, 9, 9]])
    expected = [
        [True, True, True, False, False],  # 1, 2 and the end behind them
        [True] * 5,  # an end inside a text is text; nothing is padding
        [False] * 5,
    ]
    np.testing.assert_array_equal(padding.is_text(tokens, end), expected)


def test_rows_are_one_text_each(corpus, tmp_path):
    opened = data.open_corpus(str(corpus), 16)
    tokenizer = data.find_tokenizer(opened, 300, tmp_path / "bpe.json")
    end = tokenizer.token_to_id(data.END)
    short, long = padding.padded(["a b", "word " * 100], tokenizer, 16)
    np.testing.assert_array_equal(short, [*data.encode(tokenizer, "a b"), *[end] * 20][:17])
    np.testing.assert_array_equal(long, data.encode(tokenizer, "word " * 100)[:17])


def test_padding_lowers_the_loss_of_a_model_trained_on_it(monkeypatch, tmp_path, small):
    config = dataclasses.replace(
        small,
        optimizer="moma_clipped:rank=4,min_dim_size_to_factor=32",  # the study's own
        length=1024,
        batch=4,
        lanes=1,
        steps=40,
    )
    monkeypatch.setattr(padding, "QUICK", config)
    monkeypatch.setattr("sys.argv", ["padding", "--quick", "--out", str(tmp_path)])
    side.side_study(padding.__doc__, padding.BLOCK, padding.COLUMNS, padding.rows)
    with (tmp_path / "results" / "padding.csv").open() as file:
        packed, filled = csv.DictReader(file)
    assert packed["padding, %"] == filled["padding, %"]
    share = float(filled["padding, %"]) / 100
    assert 0.1 < share < 0.9
    whole, text = (float(filled[name]) for name in ("held out", "held out, text alone"))
    # The rest of it is what padding costs, which is next to nothing once it is learned.
    assert (1 - share) * text - 1e-2 <= whole <= (1 - share) * text + 0.3 * share
    assert float(filled["held out"]) < 0.9 * float(packed["held out"])
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"| padded | {filled['padding, %']} |" in page
