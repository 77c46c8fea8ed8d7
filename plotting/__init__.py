"""The paper's figures of a trained model."""

from plotting.studies import STUDIES, Study

__all__ = ["STUDIES", "Study"]
