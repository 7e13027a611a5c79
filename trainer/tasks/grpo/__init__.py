"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) and its variants: several answers to each
prompt are compared with each other, so that no critic is needed. The table of the variants is
`trainer.recipe.sections.rollouts.losses`.
"""
