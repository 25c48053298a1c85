"""A ring of eight modes under an exact flow: one call of a network that was trained for an equal number of backward passes."""


from limbeck.convert.steps import ToSampler
from limbeck.core.batch import Batch
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.core.update import Update
from limbeck.diffusion import Draws
from limbeck.diffusion.objectives import per_sample
from limbeck.methods.mdt_dist.method import MDTDist, velocity
from limbeck.methods.mixture_proof import FLOW, begun, distance, distil, drawn, truth
from limbeck.prove import Trial

STEPS, BATCH, RATES, KIND = 1500, 128, (3e-4, 1e-3, 3e-3), "ring"
METHOD = MDTDist()
ALONE = MDTDist(vd_weight=0.0)


def consistency(m: Roles, batch: Batch) -> Update:
    """`x_0` at t is to be that at `t - dt` on the teacher's path, without gradient: the same times, noise and dt."""
    draws = Draws(m, batch)
    t, noise = METHOD.times(draws), draws.normal("noise", batch.x)
    x_t = FLOW.add_noise(batch.x, noise, t)
    v = velocity(m.teacher, x_t, t)
    before = t - METHOD.dt
    target = m.student(x_t - METHOD.dt * v, t=before).detach()
    return Update("student", per_sample((m.student(x_t, t=t) - target).square()).mean())


def run(program: Step, passes: int, seed: int, lr: float) -> Trial:
    """A student under one program, with as many steps as its backward passes allow."""
    m = Roles(teacher=truth(KIND), student=ToSampler((1.0,))(begun(seed, KIND))[0])
    counted = distil(program, m, drawn(seed, KIND), {"student": lr}, 2 * STEPS // passes, BATCH, seed)
    return Trial(distance(m.student, KIND, 2000 + seed), distance(m.student, KIND, 3000 + seed), counted, more(m, seed))


def more(m: Roles, seed: int) -> dict[str, float]:
    """Energy distances of two and four steps."""
    found = {}
    for steps in (2, 4):
        many = ToSampler(FLOW.grid(steps)[:-1].tolist(), "ddim")(m.student.module)[0]
        found[f"energy distance x 100, {steps} steps"] = distance(many, KIND, 3000 + seed)
    return found
