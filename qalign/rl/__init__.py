"""PPO: sampled answers, their rewards, and whether the reward is being hacked."""
