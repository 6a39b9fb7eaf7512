"""AdamW on Fashion-MNIST, at the learning rate that is everybody's first guess."""

from experiments.noise.problems import open_problem
from experiments.noise.setups.digits import setup

train, evaluate = setup(open_problem("fashion"), rate=1e-3, batch=32, steps=1500, prefix=500)
