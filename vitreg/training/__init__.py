"""Train Vision Transformers with registers: three regimes, registers for a model one has, and the loop.

    from vitreg.training.loop import train
    from vitreg.training.recipe import find_recipe

    run = train(find_recipe("supervised_small"), "run/")

The loop needs the extra `train`.
"""
