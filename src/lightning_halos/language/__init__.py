"""Language models: export to Hugging Face, evaluation with lm-eval, comparison of results.

transformers, datasets and lm-eval (the extra ``lm``) are imported inside functions, so that importing this package does
not need them. An error names the missing package and says how to install it.
"""
