"""Train Vision Transformers with registers: three regimes, registers for a model one has, and the loop.

vitreg.training.train(find_recipe("supervised_small"), "run/")
"""
