"""Teachers: ensembles, and outputs that are computed once and stored."""

from limbeck.teachers.cached import Cached
from limbeck.teachers.collect import collect
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.fingerprint import fingerprint
from limbeck.teachers.store import MissingOutput, OutputStore
from limbeck.teachers.topk import TopK

__all__ = ["Cached", "Ensemble", "MissingOutput", "OutputStore", "TopK", "collect", "fingerprint"]
