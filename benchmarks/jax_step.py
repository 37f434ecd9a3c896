"""The three models' training in JAX, a step or an epoch as one function that XLA compiles: a rival."""

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastnn.reference import models


def jax_step(model: nn.Module, x: Tensor, y: Tensor, lr: float) -> Callable[[], Any] | None:
    """A step with Adam on the mean square error, from the model's parameters, that returns the loss; None where JAX and
    optax are not installed. model: one of the three of ``fastnn.reference.models``."""
    made = _adam(model, lr)
    if made is None:
        return None
    import jax
    import jax.numpy as jnp

    begin, update = made
    now = list(begin)
    update = jax.jit(update)
    inputs = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

    def step() -> Any:
        *now[:], loss = update(*now, *inputs)
        return loss.block_until_ready()

    return step


def jax_epoch(model: nn.Module, x: Tensor, y: Tensor, lr: float, batch_size: int) -> Callable[[Tensor], Any] | None:
    """The same for an epoch over the rows in a given order: ``lax.scan`` over its batches, the last of which is full.
    It returns the losses."""
    made = _adam(model, lr)
    if made is None:
        return None
    import jax
    import jax.numpy as jnp

    begin, update = made
    now = list(begin)
    rows = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

    @jax.jit
    def all_batches(p: Any, state: Any, order: Any) -> Any:
        def one(carry: Any, places: Any) -> Any:
            p, state, loss = update(*carry, rows[0][places], rows[1][places])
            return (p, state), loss

        (p, state), losses = jax.lax.scan(one, (p, state), order.reshape(-1, batch_size))
        return p, state, losses

    def epoch(order: Tensor) -> Any:
        *now[:], losses = all_batches(*now, jnp.asarray(order.numpy()))
        return losses.block_until_ready()

    return epoch


def _adam(model: nn.Module, lr: float) -> tuple[tuple[Any, Any], Callable[..., Any]] | None:
    """Parameters and state at the beginning, and the function of a step: (parameters, state, x, y) -> (parameters,
    state, loss)."""
    if not (importlib.util.find_spec("jax") and importlib.util.find_spec("optax")):
        return None
    import jax
    import jax.numpy as jnp
    import optax

    parameters = {name: jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()}

    def linear(p: Any, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def conv(p: Any, name: str, x: Any, stride: int, padding: int) -> Any:
        x = jax.lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
        x = jax.nn.relu(x + p[f"{name}.bias"][:, None, None])
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def network(p: Any, x: Any) -> Any:
        if isinstance(model, models.Autoencoder):
            x = linear(p, "encoder_2", jax.nn.relu(linear(p, "encoder_1", x)))
            return linear(p, "decoder_2", jax.nn.relu(linear(p, "decoder_1", x)))
        if isinstance(model, models.Conv2DNet):
            x = conv(p, "conv2", conv(p, "conv1", x, 2, 2), 2, 1)
            return linear(p, "output", x.reshape(x.shape[0], -1))
        x = x.transpose(1, 0, 2)
        for layer in range(2):
            w_ih, w_hh, b_ih, b_hh = (
                p[f"rnn.{kind}_l{layer}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )

            def cell(h: Any, gates: Any, w_hh: Any = w_hh) -> Any:
                h = jnp.tanh(gates + h @ w_hh.T)
                return h, h

            _, x = jax.lax.scan(cell, jnp.zeros((x.shape[1], w_hh.shape[0])), x @ w_ih.T + b_ih + b_hh)
        return linear(p, "fc", x[-1])

    optimizer = optax.adam(lr)

    def update(p: Any, state: Any, x: Any, y: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean((network(p, x) - y) ** 2))(p)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(p, updates), state, loss

    return (parameters, optimizer.init(parameters)), update
