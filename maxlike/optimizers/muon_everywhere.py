"""Muon on token tables too."""

from maxlike.optimizers.muon import Muon


class MuonEverywhere(Muon):
    """Muon that orthogonalises the token embedding, learned positions and the output head as it does any matrix; only
    norm gains and biases go to `others`. A row of the ablation of Outlier-Safe Pre-Training, arXiv 2506.19697, where it
    trains worse than Muon with Adam on the tables. Knobs as of Muon.
    """

    takes = ("matrix", "embedding")
