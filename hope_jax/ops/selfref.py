"""Self-referential memories: while they read, they make their own keys, values, gates, targets."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hope_jax.ops import recurrence, selfref_fused
from hope_jax.ops.dispatch import Form, launch_refusal, pick, platform
from hope_jax.ops.pallas import gpu, one_token, tpu
from hope_jax.ops.pallas.chunk import momentum_of
from hope_jax.ops.recurrence import Factor, Path

GATES = ("eta", "alpha")
ADAPTIVE = ("k", "v", "q", *GATES)
"""What a memory may produce instead of a slow projection."""

Matrices = dict[str, tuple[Array, ...]]
"""Per memory one matrix, or two for an MLP: (output layer W1, hidden layer W2)."""


class Slow(NamedTuple):
    """What slow projections say about each token; None where a memory says it instead.

    Attributes:
      k: Keys, before normalization.
      v: Values.
      q: Queries, before normalization.
      eta: Write gate, before the bias and the sigmoid.
      alpha: Retention gate, before the bias and the sigmoid.
      beta: Momentum, before the sigmoid. No memory makes it: None means no momentum.
      eta_bias: Added to the write gate, whoever made it.
      alpha_bias: Added to the retention gate, whoever made it.
    """

    k: Float[Array, "B T H K"] | None
    v: Float[Array, "B T H V"] | None
    q: Float[Array, "B T H K"] | None
    eta: Float[Array, "B T H"] | None
    alpha: Float[Array, "B T H"] | None
    beta: Float[Array, "B T H"] | None
    eta_bias: Float[Array, " H"]
    alpha_bias: Float[Array, " H"]


class SelfReferentialMemory(NamedTuple):
    """What memories know after some tokens; comes in with a call and goes out with the result.

    Attributes:
      position: How many tokens were read. It says where in their chunk the next one stands.
      state: The matrices of every memory, `[B, H, out, in]`.
      momentum: Their momenta, None without momentum.
      held: The matrices that the next token takes keys, values, gates and errors from: the
        state at the start of its chunk, or the initial one if a document started since.
    """

    position: Int[Array, ""]
    state: Matrices
    momentum: Matrices | None
    held: Matrices


class Views(NamedTuple):
    """What a token asks of the memories, ready for use; None where a memory has to say it.

    Attributes:
      key: Unit keys.
      value: Values.
      query: Unit queries.
      write: The step of the inner update (eta in the paper).
      retain: What survives the token (alpha in the paper).
      momentum: What survives of the momentum (beta in the paper), None without.
    """

    key: Array | None
    value: Array | None
    query: Array | None
    write: Array | None
    retain: Array | None
    momentum: Array | None


class Setting(NamedTuple):
    """The keywords of `self_referential`, checked.

    Attributes:
      repeats: How often an MLP's layer may see one key under one held error and still settle; its
        step is `write / (1 + repeats write |key|^2)`.
    """

    objective: str
    dgd: bool
    anchor: bool
    normalize_targets: bool
    targets: str
    read: str
    inner_gradient: str
    chunk_memory: int
    chunk_projections: int
    write_max: float
    repeats: int = 1


def self_referential(
    x: Float[Array, "B T H K"],
    slow: Slow,
    initial: Matrices,
    memory: SelfReferentialMemory | None = None,
    starts: Bool[Array, "B T"] | None = None,
    *,
    chunk_memory: int,
    chunk_projections: int,
    objective: Literal["dot", "l2"] = "dot",
    dgd: bool = True,
    anchor: bool = True,
    normalize_targets: bool = True,
    targets: Literal["self", "value"] = "self",
    read: Literal["token", "chunk", "current"] = "token",
    inner_gradient: Literal["full", "stop"] = "full",
    write_max: float = 1.0,
    form: str = "auto",
) -> tuple[Float[Array, "B T H V"], SelfReferentialMemory]:
    """Reads `x` with memories that learn on the way, also to make their own keys and targets.

    Every head has a memory M_memory that is read by queries, and a memory M_b for each b of k, v,
    q, eta, alpha that `slow` leaves out. With Mbar the state at the start of the token's chunk
    (chunk_memory tokens for M_memory, chunk_projections for the others):

        k_t = unit(Mbar_k(x_t))    v_t = Mbar_v(x_t)    q_t = unit(Mbar_q(x_t))
        eta_t = write_max sigmoid(Mbar_eta(x_t) + eta_bias)
        alpha_t = sigmoid(Mbar_alpha(x_t) + alpha_bias)         beta_t = sigmoid(slow beta)
        vhat_b,t = Mbar_b(v_t), to unit length                  the memory's own target
        L_b = -<M(k_t), vhat_b,t>  (dot)    or  1/2 |M(k_t) - vhat_b,t|^2  (l2)
        M_b,t = M_b,0 + alpha_t (M_b,t-1 - M_b,0) - eta_t M_b,t-1 k_t k_t^T - eta_t dL_b/dM (Mbar_b)
        o_t = M_memory,t-1(q_t)

    With momentum, `S_t = beta_t S_t-1 - (1 - beta_t) eta_t dL/dM` takes the place of the last
    term. The damping (1 - beta) is ours: without it states diverge.

    A memory of one matrix is linear. One of two, (W1, W2), is the MLP `M(x) = x + W1 silu(W2 x)`,
    a gate's without the skip. Each layer learns by its own chain-rule error, forgets along its own
    input as its key, and its step is `eta / (1 + eta |key|^2)`.

    All arithmetic is in float32 at least; the output has the type of `x`.

    Args:
      x: What adaptive memories read. Ignored if `slow` has everything.
      slow: What ordinary projections say about the tokens.
      initial: The state M_b,0 of each memory, `(W,)` with W `[H, out, in]` or `(W1, W2)` with W1
        `[H, out, F]`, W2 `[H, F, K]`; out is 1 for eta and alpha. Always has "memory"; besides
        that exactly the names that `slow` leaves out.
      memory: What earlier tokens left behind; None for the initial states. A call may begin and
        end anywhere inside a chunk: reading in pieces is the same function.
      starts: True where a document starts: every memory is its initial one before that token, also
        as the state that the later tokens of the chunk hold on to, and momentum is zero.
      chunk_memory: Tokens for which M_memory holds on to one state; divides the other chunk. Both
        chunks are a part of what is computed, not of how.
      chunk_projections: Tokens for which the other memories hold on to one state.
      objective: "dot" or "l2". Dot with `dgd` is the delta rule on self-made targets.
      dgd: Whether a memory forgets along each key (delta gradient descent), the third term above.
      anchor: Whether memories decay towards their initial state; if not, towards zero.
      normalize_targets: Whether targets are scaled to unit length; those of gates, which are
        numbers, to `s / sqrt(1 + s^2)`, since unit length would leave only their sign.
      targets: "self", or "value" for vhat = v; then eta and alpha cannot be adaptive.
      read: "token" reads the memory of all earlier tokens, "current" also the token's own write,
        "chunk" the state held since the chunk's start.
      inner_gradient: "full" backpropagates through the inner updates. "stop" takes their keys and
        errors for constants; adaptive k and v memories then receive no gradient at all.
      write_max: The largest write gate. Above 1 the transition `alpha - eta` can be negative; the
        memory contracts while `eta - alpha <= 1`.
      form: "auto" or one of `FORMS`.

    Returns:
      What the queries read, and the memory after the last token.

    Raises:
      ValueError: An option, a name or a shape does not fit the others.

    References:
      Behrouz et al., "Nested Learning: The Illusion of Deep Learning Architecture", 2025, eqs.
      83-97; 54-57 for delta gradient descent.
    """
    setting = Setting(
        objective, dgd, anchor, normalize_targets, targets, read, inner_gradient,
        chunk_memory, chunk_projections, write_max,
    )  # fmt: skip
    _check(slow, initial, memory, setting, x.shape[-1])
    views = _activate(slow, write_max, _accumulation(x.dtype))
    biases = (slow.eta_bias, slow.alpha_bias)
    return learn_and_read(x, views, biases, initial, memory, starts, setting, form)


def learn_and_read(
    x: Float[Array, "B T H K"],
    views: Views,
    biases: tuple[Float[Array, " H"], Float[Array, " H"]],
    initial: Matrices,
    memory: SelfReferentialMemory | None,
    starts: Bool[Array, "B T"] | None,
    setting: Setting,
    form: str,
) -> tuple[Float[Array, "B T H V"], SelfReferentialMemory]:
    """Runs the forms behind `self_referential`, with what the slow projections say made ready.

    Args:
      x: What adaptive memories read.
      views: What slow projections say about each token.
      biases: Of the write and the retention gate; used where memories make these.
      initial: The initial state of each memory.
      memory: What earlier tokens left behind, or None.
      starts: Document starts, or None.
      setting: The options.
      form: The form; "auto" takes one of `SINGLE` for a single token.

    Returns:
      What the queries read, and the memory after the last token.
    """
    call = (x, views, biases, initial, memory, starts, setting)
    forms = SINGLE if form == "auto" and x.shape[1] == 1 else FORMS
    return pick(forms, form, *call)(*call)


def reference(
    x: Float[Array, "B T H K"],
    views: Views,
    biases: tuple[Float[Array, " H"], Float[Array, " H"]],
    initial: Matrices,
    memory: SelfReferentialMemory | None,
    starts: Bool[Array, "B T"] | None,
    setting: Setting,
) -> tuple[Float[Array, "B T H V"], SelfReferentialMemory]:
    """Follows the equations token by token; every inner gradient is taken by `jax.grad`."""
    return _one_by_one(_each_head, x, views, biases, initial, memory, starts, setting)


def stepped(
    x: Float[Array, "B T H K"],
    views: Views,
    biases: tuple[Float[Array, " H"], Float[Array, " H"]],
    initial: Matrices,
    memory: SelfReferentialMemory | None,
    starts: Bool[Array, "B T"] | None,
    setting: Setting,
) -> tuple[Float[Array, "B T H V"], SelfReferentialMemory]:
    """Computes the same as `reference` with a kernel for each token, see `ops.pallas.one_token`.

    Its memories are changed where they lie. The gradient of a token is that of the reference.
    """
    return _one_by_one(_in_one_pass, x, views, biases, initial, memory, starts, setting)


def _one_by_one(read_one, x, views, biases, initial, memory, starts, setting):
    """Scans over tokens with a function that reads one of them."""
    dtype = _accumulation(x.dtype)
    initial, biases = _cast((initial, biases), dtype)
    if memory is None:
        memory = fresh_memory(initial, x.shape[0], momentum=views.momentum is not None)

    def step(memory, token):
        return read_one(setting, initial, biases, memory, *_cast(token, dtype))

    time_first = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, views, starts))
    memory, y = jax.lax.scan(step, memory, time_first)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), memory


def _each_head(setting, initial, biases, memory, x, views, start):
    """One token of all heads of all rows: the memory after it, and what it reads."""
    if start is None:
        start = jnp.zeros(x.shape[0], bool)
    heads = jax.vmap(partial(_token, setting), in_axes=(0, 0, 0, 0, 0, 0, 0, None))
    batch = jax.vmap(heads, in_axes=(None, None, 0, 0, 0, 0, 0, 0))
    y, state, momentum, held = batch(
        initial, biases, memory.state, memory.momentum, memory.held, x, views, start
    )
    position = memory.position + 1
    held = {
        name: jax.tree.map(
            partial(jnp.where, position % _chunk_of(name, setting) == 0), state[name], held[name]
        )
        for name in initial
    }
    return SelfReferentialMemory(position, state, momentum, held), y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_one_pass(setting, initial, biases, memory, x, views, start):
    """The same by the kernel."""
    starts = None if start is None else start.astype(jnp.int32)
    token = one_token.Token(x, *views, starts=starts)
    state, momenta, held, initial = (
        {name: matrices[0] for name, matrices in tree.items()}
        for tree in (memory.state, memory.momentum or {}, memory.held, initial)
    )
    momenta = {momentum_of(name): momentum for name, momentum in momenta.items()}
    after, held, y = one_token.step(
        selfref_fused.plan_of(x, views, setting), state | momenta, held, memory.position, token,
        initial, biases, interpret=platform() != "gpu",
    )  # fmt: skip

    def alone(matrices: dict[str, Array]) -> Matrices:
        return {name: (matrices[name],) for name in held}

    momentum = None
    if momenta:
        momentum = alone({name: after[momentum_of(name)] for name in held})
    return SelfReferentialMemory(memory.position + 1, alone(after), momentum, alone(held)), y


def _in_one_pass_forward(setting, *call):
    return _in_one_pass(setting, *call), call


def _in_one_pass_backward(setting, call, slopes):
    return jax.vjp(partial(_each_head, setting), *call)[1](slopes)


_in_one_pass.defvjp(_in_one_pass_forward, _in_one_pass_backward)


def _refuses_stepping(x, views, biases, initial, memory, starts, setting):
    """Says why the kernel for single tokens does not take a call, or None if it does."""
    del x, views, biases, memory, starts, setting
    if any(len(matrices) == 2 for matrices in initial.values()):
        return "the kernel takes linear memories, got an MLP"
    return launch_refusal() or one_token.refusal(*initial["memory"][0].shape[:-3:-1])


def _token(setting, initial, biases, state, momentum, held, x, views, start):
    """One token of one head: what it reads, and what it leaves of state, momentum and held."""
    state, held = (
        jax.tree.map(partial(jnp.where, start), initial, matrices) for matrices in (state, held)
    )
    momentum = jax.tree.map(lambda matrix: jnp.where(start, 0, matrix), momentum)
    views = _complete(views, biases, setting, lambda name: _recall(name, held[name], x))

    after, momenta = {}, {}
    for name in initial:
        target = views.value
        if setting.targets == "self":
            target = _recall(name, held[name], views.value)
        after[name], momenta[name] = _update(
            setting,
            name,
            initial[name],
            state[name],
            None if momentum is None else momentum[name],
            held[name],
            _normalize(name, target) if setting.normalize_targets else target,
            views,
        )
    seen = {"token": state, "current": after, "chunk": held}[setting.read]
    y = _recall("memory", seen["memory"], views.query)
    return y, after, None if momentum is None else momenta, held


def _update(setting, name, initial, state, momentum, held, target, views):
    """One inner step of one memory of one head, layer by layer."""
    constant = jax.lax.stop_gradient if setting.inner_gradient == "stop" else lambda tree: tree
    held, key, target = constant((held, views.key, target))
    gradients = jax.grad(partial(_loss, name, setting.objective))(held, key, target)
    keys = (key,) if len(held) == 1 else (jax.nn.silu(held[1] @ key), key)

    after, momenta = [], []
    for layer, matrix in enumerate(state):
        step = views.write
        if len(state) > 1:
            step = step / (1 + setting.repeats * step * jnp.sum(keys[layer] ** 2))
        change = -step * gradients[layer]
        if momentum is not None:
            change = (1 - views.momentum) * change + views.momentum * momentum[layer]
        origin = initial[layer] if setting.anchor else jnp.zeros_like(matrix)
        next_matrix = origin + views.retain * (matrix - origin) + change
        if setting.dgd:
            next_matrix -= step * jax.grad(_recalled_energy)(matrix, keys[layer])
        after.append(next_matrix)
        momenta.append(change)
    return tuple(after), tuple(momenta)


def _loss(name, objective, matrices, key, target):
    y = _recall(name, matrices, key)
    return -jnp.dot(y, target) if objective == "dot" else 0.5 * jnp.sum((y - target) ** 2)


def _recalled_energy(matrix, key):
    """Half of |M k|^2: its gradient M k k^T is what delta gradient descent takes away."""
    return 0.5 * jnp.sum((matrix @ key) ** 2)


def _recall(name, matrices, x):
    """Reads one memory of one head with one vector."""
    if len(matrices) == 1:
        return matrices[0] @ x
    y = matrices[0] @ jax.nn.silu(matrices[1] @ x)
    return y if name in GATES else x + y


def chunked(
    x: Float[Array, "B T H K"],
    views: Views,
    biases: tuple[Float[Array, " H"], Float[Array, " H"]],
    initial: Matrices,
    memory: SelfReferentialMemory | None,
    starts: Bool[Array, "B T"] | None,
    setting: Setting,
) -> tuple[Float[Array, "B T H V"], SelfReferentialMemory]:
    """Goes from chunk to chunk; inside one, everything is a matrix product and one solve.

    A call that continues a memory is laid on the memory's own grid of chunks: tokens of an
    earlier call in front and missing ones behind are padding that changes nothing. The backward
    pass stores the states at chunk starts and computes each chunk a second time.

    Per token and head, with d = K = V, C the chunk and m linear memories, in multiply-adds: d^2
    per memory for what it says about x and d^2 for its target, 3 d^2 for the recurrence (one of
    them for the anchor), 2 d^2 for the answer; C d per memory for its writes and C d for its
    solve, 3 C d for overlaps and the answer, and C^2 / 3 for the inverse. Bytes: x, the slow
    projections and the output once, m d^2 / C numbers of state. An MLP memory with F hidden units
    costs about 5 F / d linear ones.
    """
    dtype = _accumulation(x.dtype)
    initial, biases = _cast((initial, biases), dtype)
    batch, time = x.shape[:2]
    size = setting.chunk_projections
    fresh = memory is None
    if fresh:
        memory = fresh_memory(initial, batch, momentum=views.momentum is not None)
    # A copy per row keeps the gradient's sum over the batch out of the scan.
    initial = _per_row(initial, batch)
    offset = 0 if fresh else memory.position % size
    count = -(-time // size) if fresh else -(-(time + size - 1) // size)
    whole = fresh and time % size == 0
    live = None
    if not whole:
        index = jnp.arange(count * size) - offset
        live = ((index >= 0) & (index < time)).reshape(count, 1, 1, size)
    tokens = (x, views, None if starts is None else starts[..., None])
    tokens = jax.tree.map(lambda array: _into_chunks(array, offset, count, size), tokens)

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(fast, inputs):
        tokens, live = inputs
        # What is held passes chunks of padding alone; a fresh memory meets none.
        fast = _Fast(fast.state, fast.momentum, fast.state) if fresh else fast
        return _chunk(setting, initial, biases, fast, _cast(tokens, dtype), live)

    fast, y = jax.lax.scan(chunk, _Fast(*memory[1:]), (tokens, live))
    y = _out_of_chunks(y, offset, time).astype(x.dtype)
    return y, SelfReferentialMemory(memory.position + time, *fast)


def fused(machine: ModuleType, *call) -> tuple[Float[Array, "B T H V"], SelfReferentialMemory]:
    """Computes the same as `chunked` with the kernels of a machine, see `ops.pallas`."""
    y, memory = selfref_fused.run(machine, *call)
    return y, SelfReferentialMemory(*memory)


SINGLE = {
    "pallas_token": Form(stepped, _refuses_stepping, ("gpu",)),
    "reference": Form(reference),
}
"""The forms for a single token, which costs them no chunk."""

FORMS = {
    "pallas_triton": Form(partial(fused, gpu), partial(selfref_fused.refuses, gpu), ("gpu",)),
    "pallas_tpu": Form(partial(fused, tpu), partial(selfref_fused.refuses, tpu), ("tpu",)),
    "chunked": Form(chunked),
    **SINGLE,
}


class _Fast(NamedTuple):
    """The matrices that a chunk begins or ends with: `SelfReferentialMemory` without position."""

    state: Matrices
    momentum: Matrices | None
    held: Matrices


def _chunk(setting, initial, biases, fast: _Fast, tokens, live):
    """One chunk of the projections: the matrices after it, and what its queries read.

    All of it is a function of the matrices at its start and of its tokens: `x [B, H, C, K]`, views
    `[B, H, C, ...]`, starts `[B, 1, C]` or None, live `[1, 1, C]` or None.
    """
    x, views, starts = tokens
    opening = _opening(starts)
    views = _complete(
        views,
        tuple(bias[:, None] for bias in biases),
        setting,
        lambda name: _recall_held(name, fast.held[name], initial[name], opening, x),
    )
    if setting.chunk_memory == setting.chunk_projections:
        return _learn_and_read(setting, initial, fast, views, starts, live)

    projections, _ = _learn(
        setting, initial, _part(fast, [name for name in initial if name != "memory"]),
        views, starts, live,
    )  # fmt: skip
    inputs = jax.tree.map(
        lambda array: _into_parts(array, setting.chunk_memory), (views, starts, live)
    )
    memory, y = jax.lax.scan(
        lambda memory, inputs: _learn_and_read(setting, initial, memory, *inputs),
        _part(fast, ["memory"]),
        inputs,
    )
    fast = _Fast(
        projections.state | memory.state,
        fast.momentum and (projections.momentum or {}) | (memory.momentum or {}),
        projections.held | memory.held,
    )
    y = jnp.moveaxis(y, 0, 2)
    return fast, y.reshape(*y.shape[:2], -1, y.shape[-1])


def _learn_and_read(setting, initial, fast: _Fast, views, starts, live):
    """Teaches memories a chunk that is one of M_memory's, and reads M_memory."""
    after, paths = _learn(setting, initial, fast, views, starts, live)
    layers = initial["memory"], fast.held["memory"]
    return after, _read(setting, *layers, _opening(starts), paths["memory"], views.query)


class _Lesson(NamedTuple):
    """What one layer of a memory is taught in a chunk.

    Attributes:
      key: What goes into the layer.
      step: The write gate of the layer.
      error: What should come out more, `-dL/d output`.
    """

    key: Float[Array, "B H C in"]
    step: Float[Array, "B H C"]
    error: Float[Array, "B H C out"]


def _learn(setting, initial, fast: _Fast, views, starts, live):
    """Teaches memories a chunk: the matrices after it, and by name each layer's factor and path.

    Layers that share keys and step share a factor: all linear memories do, and so do the hidden
    layers of all MLPs.
    """
    opening = _opening(starts)
    factors, paths, state, momentum = {}, {}, {}, {}
    for name in fast.state:
        lessons = _lessons(setting, name, initial[name], fast.held[name], opening, views)
        paths[name] = []
        for layer, lesson in enumerate(lessons):
            shared = len(lessons) if layer == len(lessons) - 1 else name
            if shared not in factors:
                factors[shared] = recurrence.factor(
                    lesson.key,
                    views.retain,
                    lesson.step if setting.dgd else None,
                    views.momentum,
                    starts,
                    live,
                    anchor=setting.anchor,
                )
            step = lesson.step if views.momentum is None else (1 - views.momentum) * lesson.step
            path = recurrence.follow(
                factors[shared],
                fast.state[name][layer],
                step[..., None] * lesson.error,
                None if fast.momentum is None else fast.momentum[name][layer],
                initial[name][layer],
            )
            paths[name].append((factors[shared], path))
        ends = [recurrence.advance(*taught) for taught in paths[name]]
        state[name], momentum[name] = zip(*ends, strict=True)
    held = _next_held(initial, state, fast.held, starts, live)
    return _Fast(state, None if fast.momentum is None else momentum, held), paths


def _lessons(setting, name, initial, held, opening, views):
    """Works out what a memory's held state teaches each of its layers."""
    constant = jax.lax.stop_gradient if setting.inner_gradient == "stop" else lambda tree: tree
    recall = partial(_recall_held, name, held, initial, opening)
    target = recall(views.value) if setting.targets == "self" else views.value
    target = _normalize(name, target) if setting.normalize_targets else target
    error = target if setting.objective == "dot" else target - recall(views.key)
    key = constant(views.key)
    if len(held) == 1:
        return [_Lesson(key, views.write, constant(error))]

    inner, pull = jax.vjp(jax.nn.silu, _product(held[1], initial[1], opening, views.key))
    back = _product(_transpose(held[0]), _transpose(initial[0]), opening, error)
    slope = pull(back)[0]
    inner, slope, error = constant((inner, slope, error))
    return [
        _Lesson(inner, _proximal(setting, views.write, inner), error),
        _Lesson(key, _proximal(setting, views.write, key), slope),
    ]


def _proximal(setting, write, key):
    """The step of an MLP's layer, which keeps `retain - step |key|^2` inside (-1, 1)."""
    return write / (1 + setting.repeats * write * jnp.sum(key**2, -1))


def _read(setting, initial, held, opening, paths: list[tuple[Factor, Path]], query):
    """Reads M_memory with every token's query, at the state that the setting names."""
    if setting.read == "chunk":
        return _recall_held("memory", held, initial, opening, query)
    own = setting.read == "current"
    if len(paths) == 1:
        return recurrence.read(*paths[0], query, own=own)
    inner = jax.nn.silu(recurrence.read(*paths[1], query, own=own))
    return query + recurrence.read(*paths[0], inner, own=own)


def _recall_held(name, held, initial, opening, x):
    """Reads one memory's held state with every token of a chunk."""
    if len(held) == 1:
        return _product(held[0], initial[0], opening, x)
    y = jax.nn.silu(_product(held[1], initial[1], opening, x))
    y = _product(held[0], initial[0], opening, y)
    return y if name in GATES else x + y


def _product(held, initial, opening, x):
    """Multiplies each token by the held matrix, or by the initial one after a document start."""
    y = jnp.einsum("BHVK,BHCK->BHCV", held, x)
    if opening is None:
        return y
    return jnp.where(opening[..., None], y, jnp.einsum("BHVK,BHCK->BHCV", initial, x))


def _opening(starts):
    """Says which tokens still belong to the document that the chunk began in."""
    return None if starts is None else jnp.cumsum(starts, -1) == 0


def _next_held(initial, state, held, starts, live):
    """What the token after this chunk's last live one holds on to."""
    if live is None:
        return state
    if starts is not None:
        began = jnp.any(starts, -1)[..., None, None]
        held = {
            name: jax.tree.map(partial(jnp.where, began), initial[name], held[name])
            for name in held
        }
    return jax.tree.map(partial(jnp.where, live[..., -1]), state, held)


def _complete(
    views: Views, biases: tuple[Array, ...], setting: Setting, recall: Callable[[str], Array]
) -> Views:
    """Lets adaptive memories say what the slow projections have not said."""
    key, value, query, write, retain, momentum = views
    key = _unit(recall("k")) if key is None else key
    value = recall("v") if value is None else value
    query = _unit(recall("q")) if query is None else query
    if write is None:
        write = setting.write_max * jax.nn.sigmoid(recall("eta")[..., 0] + biases[0])
    if retain is None:
        retain = jax.nn.sigmoid(recall("alpha")[..., 0] + biases[1])
    return Views(key, value, query, write, retain, momentum)


def _activate(slow, write_max, dtype):
    """Normalizes and squashes what slow projections say."""
    k, v, q, eta, alpha, beta, eta_bias, alpha_bias = _cast(slow, dtype)
    return Views(
        None if k is None else _unit(k),
        v,
        None if q is None else _unit(q),
        None if eta is None else write_max * jax.nn.sigmoid(eta + eta_bias),
        None if alpha is None else jax.nn.sigmoid(alpha + alpha_bias),
        None if beta is None else jax.nn.sigmoid(beta),
    )


def _unit(x):
    return x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-6)


def _normalize(name, target):
    return target / jnp.sqrt(1 + target**2) if name in GATES else _unit(target)


def _accumulation(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _cast(tree, dtype):
    return jax.tree.map(lambda array: array if array.dtype == bool else array.astype(dtype), tree)


def _per_row(initial, batch):
    return jax.tree.map(lambda matrix: jnp.broadcast_to(matrix, (batch, *matrix.shape)), initial)


def fresh_memory(initial: Matrices, batch: int, *, momentum: bool) -> SelfReferentialMemory:
    """The memory before the first token; `momentum` says whether the memories have one."""
    state = _per_row(initial, batch)
    momenta = jax.tree.map(jnp.zeros_like, state) if momentum else None
    return SelfReferentialMemory(jnp.zeros((), jnp.int32), state, momenta, state)


def _chunk_of(name, setting):
    return setting.chunk_memory if name == "memory" else setting.chunk_projections


def _transpose(matrix):
    return jnp.swapaxes(matrix, -1, -2)


def _part(fast, names):
    """The matrices of some memories alone."""
    return _Fast(*(tree and {name: tree[name] for name in names} for tree in fast))


def _into_chunks(array, offset, count, size):
    """Cuts `[B, T, H, ...]` into `[N, B, H, C, ...]`, with padding before `offset` and behind."""
    batch, time, *rest = array.shape
    if time != count * size:
        room = jnp.zeros((batch, count * size, *rest), array.dtype)
        array = jax.lax.dynamic_update_slice_in_dim(room, array, offset, 1)
    array = array.reshape(batch, count, size, *rest)
    return array.transpose(1, 0, 3, 2, *range(4, array.ndim))


def _out_of_chunks(array, offset, time):
    """Puts `[N, B, H, C, V]` together as `[B, T, H, V]`, without the padding."""
    count, batch, heads, size, width = array.shape
    array = array.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, width)
    return array if time == count * size else jax.lax.dynamic_slice_in_dim(array, offset, time, 1)


def _into_parts(array, size):
    """Cuts the tokens `[B, H, C, ...]` of a chunk into `[N, B, H, size, ...]`."""
    array = array.reshape(*array.shape[:2], -1, size, *array.shape[3:])
    return jnp.moveaxis(array, 2, 0)


def _check(slow, initial, memory, setting, width):
    choices = {
        "objective": ("dot", "l2"),
        "targets": ("self", "value"),
        "read": ("token", "chunk", "current"),
        "inner_gradient": ("full", "stop"),
    }
    for option, names in choices.items():
        if getattr(setting, option) not in names:
            got = getattr(setting, option)
            raise ValueError(f"{option} must be one of {', '.join(names)}, got {got}")
    if setting.chunk_memory < 1:
        raise ValueError(f"chunk_memory must be at least 1, got {setting.chunk_memory}")
    if setting.chunk_projections < 1 or setting.chunk_projections % setting.chunk_memory:
        raise ValueError(
            f"chunk_projections must be a multiple of chunk_memory {setting.chunk_memory}, "
            f"got {setting.chunk_projections}"
        )
    expected = {"memory"} | {name for name in ADAPTIVE if getattr(slow, name) is None}
    if set(initial) != expected:
        raise ValueError(
            f"initial must have what slow leaves out, {sorted(expected)}, got {sorted(initial)}"
        )
    if setting.targets == "value" and expected & set(GATES):
        raise ValueError("targets must be self for adaptive eta or alpha, got value")
    if memory is not None and (memory.momentum is None) != (slow.beta is None):
        has = "none" if memory.momentum is None else "one"
        raise ValueError(f"memory must hold momenta exactly if slow has beta, got {has}")
    for name, matrices in initial.items():
        _check_matrices(name, matrices, width)


def _check_matrices(name, matrices, width):
    shapes = [matrix.shape for matrix in matrices]
    if len(matrices) not in (1, 2):
        raise ValueError(f"initial[{name}] must be one matrix or two, got {len(matrices)}")
    if shapes[-1][-1] != width or (len(matrices) == 2 and shapes[0][2] != shapes[1][1]):
        raise ValueError(
            f"initial[{name}] must lead from width {width} to its output, got {shapes}"
        )
    outputs = 1 if name in GATES else width
    if (name != "memory" or len(matrices) == 2) and shapes[0][1] != outputs:
        raise ValueError(f"initial[{name}] must have {outputs} outputs, got {shapes}")
