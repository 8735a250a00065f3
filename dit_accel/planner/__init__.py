"""The planner: what a pattern costs and shows on a model, before anything runs."""

from __future__ import annotations

from dit_accel.planner.diagnosis import Diagnosis, diagnose
from dit_accel.planner.forecast import Forecast, plan

__all__ = ["Diagnosis", "Forecast", "diagnose", "plan"]
