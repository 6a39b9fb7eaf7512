"""Reading, splitting and scoring of the study's tasks."""

import numpy as np
import pytest
from sklearn import metrics

from experiments.glue import tasks
from experiments.glue.tasks import KINDS

FILES = {
    "sst2/train.txt": "1 good .\n0 bad .\n",
    "sst2/dev.txt": "0 caf\xe9 .\n",
    "sst2/test.txt": "1 fine .\n",
    "trec/train.txt": "5 How far ?\n0 How ?\n",
    "trec/test.txt": "3 Who ?\n",
    "cola/in_domain_train.tsv": 'gj04\t1\t\tHe said "go.\ngj04\t0\t*\tGo he.\n',
    "cola/in_domain_dev.tsv": "gj04\t1\t\tI go.\n",
    "cola/out_of_domain_dev.tsv": "cj99\t0\t*\tI goes.\n",
    "mrpc/train.tsv": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tA "b.\tA b!\n',
    "mrpc/val.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tC.\tD.\n",
    "mrpc/test.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tE.\tF.\n",
    "rte_glue/train.tsv": "sentence1\tsentence2\tlabel\tidx\nA.\tB.\t1\t0\n",
    "rte_glue/dev.tsv": "sentence1\tsentence2\tlabel\tidx\nC.\tD.\t0\t0\n",
    "sick/train.txt": "pair_ID\tA\tB\ts\te\n1\tA\tB\t4.5\tNEUTRAL\n2\tA\tC\t1\tCONTRADICTION\n",
    "sick/trial.txt": "pair_ID\tA\tB\ts\te\n1\tA\tB\t4.5\tENTAILMENT\n",
    "sick/test.txt": "pair_ID\tA\tB\ts\te\n1\tA\tB\t4.5\tNEUTRAL\n",
    "sts_2012_2015/train.tsv": "4.5\ta b\tnew\n\tno\tlabel\n3\tone\ttwo\n",
    "sts_2012_2015/val.tsv": "0\tone\tthree\n",
    "sts_2012_2015/test.tsv": "1\tone\tfour\n",
    "ag_news/dev.csv": 'label,content\n3,"Oil, ""up"""\n',
    "ag_news/test.csv": "label,content\n1,War\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="latin-1" if "sst2" in name else "utf-8")
    return tmp_path


def test_reads_every_layout(folder):
    rows = {name: tasks.from_folder(name, folder) for name in KINDS}
    assert rows["sst2"]["train"] == [("good .", 1.0), ("bad .", 0.0)]
    assert rows["sst2"]["dev"] == [("caf\xe9 .", 0.0)]
    assert rows["trec"] == {"train": [("How far ?", 5.0), ("How ?", 0.0)], "test": [("Who ?", 3.0)]}
    assert rows["cola"]["train"] == [('He said "go.', 1.0), ("Go he.", 0.0)]
    assert rows["cola"]["test"] == [("I goes.", 0.0)]
    assert rows["mrpc"]["train"] == [(('A "b.', "A b!"), 1.0)]
    assert rows["rte"] == {"train": [(("A.", "B."), 1.0)], "test": [(("C.", "D."), 0.0)]}
    assert rows["sick"]["train"] == [(("A", "B"), 1.0), (("A", "C"), 2.0)]
    assert rows["sick"]["dev"] == [(("A", "B"), 0.0)]
    # A pair of MRPC's, whatever its punctuation, and a row without a label are left out.
    assert rows["sts"]["train"] == [(("one", "two"), 3.0)]
    assert rows["ag_news"] == {"train": [('Oil, "up"', 2.0)], "test": [("War", 0.0)]}


def test_says_which_file_is_missing(folder):
    (folder / "trec" / "test.txt").unlink()
    with pytest.raises(tasks.DataError, match=r"test\.txt is missing: OPTAX_MOMA_DATA must name"):
        tasks.from_folder("trec", folder)


def test_reads_the_hub_by_its_columns():
    def load(path, config):
        assert (path, config) == ("nyu-mll/glue", "rte")
        row = {"sentence1": "A.", "sentence2": "B.", "label": 1}
        return {"train": [row], "validation": [row | {"label": 0}], "test": [row | {"label": -1}]}

    assert tasks.from_hub("rte", load) == {
        "train": [(("A.", "B."), 1)],
        "test": [(("A.", "B."), 0)],
    }

    def offline(*_):
        raise ConnectionError("no network")

    with pytest.raises(tasks.DataError, match="no network"):
        tasks.from_hub("trec", offline)


def test_splits_do_not_overlap_and_keep_to_their_sizes():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{f"w{i}": i + 1 for i in range(60)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = {
        "train": [(f"w{i}", i % 2) for i in range(50)],
        "test": [(f"w{i}", 1.0) for i in range(50, 60)],
    }
    task = tasks.make_task("sst2", rows, tokenizer, tasks.Sizes(train=30, dev=12, test=5))
    seen = {split: set(own.tokens[:, 0].tolist()) for split, own in task.splits.items()}
    assert {split: len(own) for split, own in seen.items()} == {"train": 30, "dev": 12, "test": 5}
    assert not seen["train"] & seen["dev"] and not seen["test"] & (seen["train"] | seen["dev"])
    again = tasks.make_task("sst2", rows, tokenizer, tasks.Sizes(train=30, dev=12, test=5))
    np.testing.assert_array_equal(again.splits["dev"].tokens, task.splits["dev"].tokens)


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    out = rng.normal(size=(50, 6)).astype(np.float32)
    two, three = rng.integers(0, 2, 50), rng.integers(0, 3, 50)
    assert tasks.scores(KINDS["cola"], out, two)["matthews"] == pytest.approx(
        metrics.matthews_corrcoef(two, out[:, :2].argmax(1))
    )
    found = tasks.scores(KINDS["mrpc"], out, two)
    assert found["f1"] == pytest.approx(metrics.f1_score(two, out[:, :2].argmax(1)))
    assert found["accuracy"] == pytest.approx(np.mean(two == out[:, :2].argmax(1)))
    assert tasks.scores(KINDS["sick"], out, three)["accuracy"] == np.mean(
        three == out[:, :3].argmax(1)
    )
    real = np.round(out[:, 0] + rng.normal(size=50), 1)
    found = tasks.scores(KINDS["sts"], out, real)
    assert found["pearson"] == pytest.approx(np.corrcoef(out[:, 0], real)[0, 1])
    ranks = [np.array([np.sum(v < x) + np.sum(v == x) / 2 for x in v]) for v in (out[:, 0], real)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert tasks.correlation(np.ones(3), np.arange(3)) == 0
