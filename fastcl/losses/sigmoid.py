"""Every pair a yes-or-no question: the one function of pairs that SigLIP and binary NCE are made of.

May import :mod:`fastcl.panels`. It is what the backends' kernels named "sigmoid" mean, and what they are judged by.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastcl.panels import Outputs, Panel, Slopes, panel_function


@panel_function(outputs=1, kernel="sigmoid")
def sigmoid_rows(panel: Panel):
    """-log sigmoid(x) of the row's own key and of those of its label, -log sigmoid(-x) of all others, summed.

    x is S minus the column's parameter, if columns have one; the row's parameter, if rows have one, is a factor of the
    others. A key of the row's id, unless it is one of the former, is left out.
    """
    logits = panel.s.sub_(panel.column_params[0]) if len(panel.column_params) else panel.s
    positive = panel.self_pair
    if panel.tags.labels is not None:
        positive = positive | panel.same_label
    signed = torch.where(positive, -logits, logits)
    if panel.tags.ids is not None:
        signed.masked_fill_((panel.tags.ids[:, None] == panel.key_tags.ids) & ~positive, -torch.inf)
    factors = torch.ones_like(signed)
    if len(panel.row_params):
        factors = torch.where(positive, factors, panel.row_params[0][:, None])

    def pull_back(incoming: Outputs) -> Slopes:
        slope = torch.where(positive, -1.0, factors).mul_(signed.sigmoid()).mul_(incoming[0][:, None])
        of_columns = -slope.sum(dim=0, keepdim=True) if len(panel.column_params) else None
        return Slopes(slope, column_params=of_columns)

    return (F.softplus(signed, threshold=40.0).mul_(factors).sum(dim=1),), pull_back
