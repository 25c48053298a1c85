"""DistillWeighted: several models of other tasks teach one classifier."""
