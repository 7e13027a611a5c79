"""The settings of tasks that learn from texts of the model in training: rewards, engines, ppo and grpo."""
