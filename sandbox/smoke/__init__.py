"""`make smoke`: the main job from sign-up to payout, headless, through public interfaces only."""
