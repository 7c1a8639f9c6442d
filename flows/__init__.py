"""What Prefect runs, each flow readable from top to bottom: runs, nights, reruns, shadow runs, retention, training."""
