"""Language models: export to Hugging Face, evaluation with lm-eval, comparison of results.

Rules of this package: it needs the extra ``lm``, but only when something is done. transformers, datasets and lm-eval
are imported inside functions, and a missing one is reported with what to install.
"""
