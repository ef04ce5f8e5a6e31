"""Preflight: what is to be trained is copied and tried before a run begins.

A mistake surfaces at the call, in words and in the notebook, and nothing has been started.
"""

from parakit.preflight.behaviour import Wanted, traits_for_evaluation, traits_of
from parakit.preflight.copies import check_model, frozen_parts
from parakit.preflight.trial import Trial

__all__ = ["Trial", "Wanted", "check_model", "frozen_parts", "traits_for_evaluation", "traits_of"]
