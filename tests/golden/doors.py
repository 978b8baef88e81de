"""The one place where the golden files' modules import from inside fastload: what moves is renamed here."""

from fastload.plan import Position as Position
from fastload.plan.mixture import MixturePosition as MixturePosition
