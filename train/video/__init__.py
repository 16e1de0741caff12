"""What only models of frames have: rollouts, their scores and pictures, the codec."""
