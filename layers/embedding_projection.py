"""Embedding projections: a trained square matrix behind the embedding and one in front of the head.

    x_0 = E[tokens] P_in;    logits = (norm(h_L) P_out) W

Source: Outlier-Safe Pre-Training, arXiv 2506.19697, section 3 (EmbProj). The tables E and W stay with an elementwise
optimizer, which pushes their outliers onto single channels; the projections, which Muon trains, spread them again. Bind
`LanguageModel.embed` to ProjectedEmbed, `LanguageModel.head` to ProjectedHead, or one of the two. After training they
are multiplied into the tables (`layers.merging`): E P_in and P_out W make a network without them.
"""

import copy
from collections.abc import Callable

import jax
from flax import nnx

from layers import merging
from layers.context import Context
from layers.embed import Embed, Head
from layers.linear import Linear


def _projection(dim: int, rngs: nnx.Rngs) -> Linear:
    """A square matrix of two sides, so that Muon takes it; orthogonal when training begins, free from then on."""
    init = jax.nn.initializers.orthogonal()
    return Linear((dim,), (dim,), ("embed",), ("embed_out",), init=init, rngs=rngs)


class ProjectedEmbed(nnx.Module):
    """x = embed(tokens) P_in, with P_in [D, D] orthogonal at initialisation and without bias.

    tokens_BT: int32 [B, T]; x: [B, T, D].

    Knobs: embed: factory of an Embed.
    Refuses an embed with a norm of its own, behind which P_in could not be merged into the table; and a tied head
    (LanguageModel): the table would have to become E P_in for the tokens and stay E for the logits.
    """

    tieable = False

    def __init__(self, vocab: int, dim: int, *, embed: Callable = Embed, rngs: nnx.Rngs):
        self.embed = embed(vocab, dim, rngs=rngs)
        if self.embed.norm is not None:
            raise ValueError(
                "ProjectedEmbed.embed has a norm between the table and the projection, which then cannot be merged: "
                "set Embed.norm = None"
            )
        self.projection = _projection(dim, rngs)

    @property
    def table(self) -> nnx.Param:
        """The table [V, D] in front of the projection."""
        return self.embed.table

    @property
    def positions(self) -> nnx.Param | None:
        """Learned positions, see Embed."""
        return self.embed.positions

    def weights(self) -> jax.Array:
        """The table [V, D], as Embed has it; no tied head may read it."""
        return self.embed.weights()

    def __call__(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        return self.projection(self.embed(tokens_BT, ctx))

    def flops_per_token(self) -> float:
        return self.embed.flops_per_token() + self.projection.flops_per_token()

    def merged(self) -> Embed:
        """An Embed with the table E P_in, and learned positions likewise."""
        plain, p_in_DD = copy.copy(self.embed), self.projection.kernel[...]
        plain.table = plain.table.replace(merging.product(plain.table[...], p_in_DD))
        if plain.positions is not None:
            plain.positions = plain.positions.replace(merging.product(plain.positions[...], p_in_DD))
        return plain


class ProjectedHead(nnx.Module):
    """logits = head(h P_out), with P_out [D, D] orthogonal at initialisation and without bias.

    hidden_BTD: [B, T, D] after the final norm; table_VD and logits as of Head.

    Knobs: head: factory of a Head that is not tied.
    Refuses a tied head: merged, W would be P_out E^T and no longer the embedding's table.
    """

    def __init__(self, vocab: int, dim: int, *, head: Callable = Head, rngs: nnx.Rngs):
        self.projection = _projection(dim, rngs)
        self.head = head(vocab, dim, rngs=rngs)
        if self.head.tied:
            raise ValueError(
                "ProjectedHead.head is tied to the embedding's table, into which the projection cannot be merged: set "
                "Head.tied = False"
            )

    @property
    def tied(self) -> bool:
        """False."""
        return self.head.tied

    def __call__(self, hidden_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        return self.head(self.projection(hidden_BTD), table_VD)

    def flops_per_token(self, vocab: int) -> float:
        """Of `vocab` logits, padding not counted."""
        return self.projection.flops_per_token() + self.head.flops_per_token(vocab)

    def merged(self) -> Head:
        """A Head with the matrix P_out W."""
        plain, linear = copy.copy(self.head), copy.copy(self.head.linear)
        linear.kernel = linear.kernel.replace(merging.product(self.projection.kernel[...], linear.kernel[...]))
        plain.linear = linear
        return plain
