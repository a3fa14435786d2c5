"""Ray Serve for the tests, in a process of its own: python session.py BUNDLE PORT. Stops when its stdin ends."""

from __future__ import annotations

import sys
from pathlib import Path

import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

PLACE = Path(__file__).parents[2] / "deploy/ray_serve"
sys.path.insert(0, str(PLACE))
import app  # noqa: E402

tree = yaml.safe_load((PLACE / "serve.yaml").read_text(encoding="utf-8"))
ServeDeploySchema.model_validate(tree)  # raises for what Ray does not know
deployment = tree["applications"][0]["deployments"][0]

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
settings = app.Settings(bundle=sys.argv[1])
# As the file says; what `build` makes; and one of two replicas with little room.
own = app.Classifier.options(**deployment).bind(settings.bundle)
serve.run(own, name="file", route_prefix=tree["applications"][0]["route_prefix"])
narrow = app.Classifier.options(
    num_replicas=2, autoscaling_config=None, max_ongoing_requests=1, max_queued_requests=2,
    ray_actor_options={"num_cpus": 0.5},
)  # fmt: skip
serve.run(narrow.bind(settings.bundle), name="narrow", route_prefix="/narrow")
for name, status in sorted(serve.status().applications.items()):
    replicas = status.deployments["Classifier"].replica_states
    print(name, status.status.value, sum(replicas.values()), flush=True)
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
print("stopped", flush=True)
