"""Distillation from unlabelled web images by selection and a shared classifier: KD^3 (Tang et al. 2023)."""
