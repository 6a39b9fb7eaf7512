"""Images in streams: classes that come two at a time, and digits that come from other sources.

| stream | tasks | the base has seen |
|---|---|---|
| classes | Fashion-MNIST, two classes at a time (5 tasks) | 100 images of the ten classes |
| domains | digits: negative, turned, noisy, of another scanner (4 tasks) | 1,000 plain digits |

As with the pretrained models of the literature, the base knows all classes a little, and its last
layer, which tells them apart, is frozen for all methods. Answers are always among all ten classes:
nobody says which task an image is from.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.noise.images import Images, digits, fashion, mnist
from experiments.noise.problems import CLASSES, classify, features, init_classifier

Params = Any
WIDTHS = (256, 256)
HEAD = f"layer{len(WIDTHS)}"
SIZES = {"classes": (2000, 400, 1000), "domains": (1000, 300, 497)}
"""Images of a task to train on, to choose on, and to report on."""
BASE_IMAGES = {"classes": 100, "domains": 1000}
DOMAINS = ("negative", "turned", "noisy", "scanner")


class Stream(NamedTuple):
    """A base, the tasks, and the orders in which they come.

    Attributes:
      name: what the results call it.
      base: the params before the first task, without the head.
      head: the frozen last layer.
      tasks: by name, train, dev and test.
      orders: names of all tasks, three times.
    """

    name: str
    base: Params
    head: Params
    tasks: Mapping[str, Mapping[str, Images]]
    orders: Sequence[tuple[str, ...]]


def orders(names: Sequence[str], count: int = 3) -> list[tuple[str, ...]]:
    """Random orders, at most one for each last task: that is the one nobody forgets."""
    rng, found = np.random.default_rng(0), []
    while len(found) < min(count, len(names)):
        order = tuple(names[i] for i in rng.permutation(len(names)))
        if order[-1] not in [other[-1] for other in found]:
            found.append(order)
    return found


def cut(images: Images, sizes: Sequence[int], key: int) -> dict[str, Images]:
    """Train, dev and test, disjoint, drawn at random."""
    order = np.random.default_rng(key).permutation(len(images.y))
    ends = np.cumsum(sizes)
    if ends[-1] > len(order):
        raise ValueError(f"{len(order)} images are not {sum(sizes)}.")
    parts = np.split(order[: ends[-1]], ends[:-1])
    return {
        name: Images(images.x[i], images.y[i])
        for name, i in zip(("train", "dev", "test"), parts, strict=True)
    }


def class_stream(training: Images, dev: Images, test: Images) -> Stream:
    """Two classes a task, and another pairing of the classes in each of the three orders."""
    rng = np.random.default_rng(0)
    few = rng.permutation(len(training.y))[: BASE_IMAGES["classes"]]
    rest = np.setdiff1d(np.arange(len(training.y)), few)
    pairs = [tuple(rng.permutation(CLASSES).reshape(-1, 2).tolist()) for _ in range(3)]
    tasks, three = {}, []
    for order in pairs:
        names = tuple("+".join(map(str, sorted(pair))) for pair in order)
        three.append(names)
        for name, pair in zip(names, order, strict=True):
            tasks[name] = {
                split: _first(images, pair, size)
                for split, images, size in zip(
                    ("train", "dev", "test"),
                    (Images(training.x[rest], training.y[rest]), dev, test),
                    SIZES["classes"],
                    strict=True,
                )
            }
    base, head = trained_base(Images(training.x[few], training.y[few]))
    return Stream("classes", base, head, tasks, three)


def _first(images: Images, classes: Sequence[int], size: int) -> Images:
    rows = np.flatnonzero(np.isin(images.y, classes))[:size]
    if len(rows) < size:
        raise ValueError(f"classes {classes} have {len(rows)} images, {size} are wanted.")
    return Images(images.x[rows], images.y[rows])


def domain_stream(plain: Images, scanner: Images) -> Stream:
    """Disjoint plain digits for the base and for each of three changes; a source of its own."""
    sizes = SIZES["domains"]
    order = np.random.default_rng(1).permutation(len(plain.y))
    starts = np.cumsum([BASE_IMAGES["domains"], *[sum(sizes)] * 3])
    parts = [Images(plain.x[i], plain.y[i]) for i in np.split(order, starts)[:4]]
    sources = [*map(changed, DOMAINS[:3], parts[1:]), scanner]
    tasks = {
        name: cut(images, sizes, key)
        for key, (name, images) in enumerate(zip(DOMAINS, sources, strict=True))
    }
    base, head = trained_base(parts[0])
    return Stream("domains", base, head, tasks, orders(DOMAINS))


def changed(name: str, images: Images) -> Images:
    """White for black, a quarter turn, or noise."""
    if name == "negative":
        x = 1 - images.x
    elif name == "turned":
        x = np.rot90(images.x, axes=(1, 2))
    else:
        noise = np.random.default_rng(2).normal(0, 0.4, images.x.shape)
        x = np.clip(images.x + noise, 0, 1)
    return Images(np.ascontiguousarray(x, np.float32), images.y)


def open_stream(name: str) -> Stream:
    """``classes`` or ``domains``."""
    if name == "classes":
        return class_stream(*fashion())
    return domain_stream(mnist(), digits())


def trained_base(images: Images, steps: int = 300) -> tuple[Params, Params]:
    """A classifier trained on all of these images at once: its body, and its head."""
    params = init_classifier(jax.random.key(0), WIDTHS)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.1)

    def loss(params: Params) -> jax.Array:
        logits = classify(params, images.x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, images.y))

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params, _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0])(params)
    return {k: v for k, v in params.items() if k != HEAD}, params[HEAD]


def logits(body: Params, head: Params, x: jax.Array) -> jax.Array:
    """(batch, SIDE, SIDE) -> (batch, CLASSES)."""
    return classify({**body, HEAD: head}, x)


def hidden(body: Params, x: jax.Array) -> jax.Array:
    """The features that the frozen head reads, (batch, width)."""
    return features({**body, HEAD: None}, x)


def before_last(body: Params, x: jax.Array) -> jax.Array:
    """What the body's last layer reads, (batch, width)."""
    return features({"layer0": body["layer0"], HEAD: None}, x)
