"""From a trained model and a control video to a new clip."""
