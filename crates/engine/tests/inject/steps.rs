//! Where a run can be disturbed: every kill point, every call of the machine monitor and every commit to
//! the store is a *step* with a label. A dry run lists the steps, later runs are disturbed at one each.
use std::collections::HashMap;

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// The server is no more: the driver ends there.
    Crash,
    /// The call fails without any effect.
    Refuse,
    /// The call has its effect, and fails all the same.
    RefuseAfter,
    /// The VMM dies, then the call is made.
    Die,
    /// The call is made, then the VMM dies.
    DieAfter,
    /// The call waits until the scenario releases it.
    Stall,
}

/// A label and which of its occurrences, from 1.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Step {
    pub label: String,
    pub nth: usize,
}

impl Step {
    pub fn new(label: &str, nth: usize) -> Step {
        let label = label.to_owned();
        Step { label, nth }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} #{}", self.label, self.nth)
    }
}

/// Payload of the panic that ends a driver.
pub struct Crash;

/// Deterministic numbers (splitmix64); the seed is printed by whoever fails.
#[derive(Debug, Clone)]
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Default)]
pub struct Steps {
    pub armed: bool,
    pub seen: Vec<Step>,
    counts: HashMap<String, usize>,
    plans: Vec<(Step, Act)>,
    /// Crashes at the step with this number, from 1.
    crash_at: Option<usize>,
    /// Disturbs one call in this many.
    pub random: Option<(Dice, usize)>,
    pub crashed: bool,
    /// Every disturbance that took place.
    pub hits: Vec<(Step, Act)>,
}

impl Steps {
    /// From now on steps are counted from one again and `plans` are carried out.
    pub fn arm(&mut self, plans: Vec<(Step, Act)>) {
        *self = Steps {
            armed: true,
            plans,
            random: self.random.take(),
            ..Steps::default()
        };
    }

    /// From now on steps are counted from one again, and the one with this number is the last.
    pub fn arm_crash_at(&mut self, number: usize) {
        self.arm(Vec::new());
        self.crash_at = Some(number);
    }

    pub fn disarm(&mut self) -> Vec<Step> {
        self.armed = false;
        std::mem::take(&mut self.seen)
    }

    /// The step is reached; what is to happen there.
    pub fn hit(&mut self, label: &str) -> Option<Act> {
        if self.crashed {
            return Some(Act::Crash);
        }
        if !self.armed {
            return None;
        }
        let count = self.counts.entry(label.to_owned()).or_default();
        *count += 1;
        let step = Step::new(label, *count);
        self.seen.push(step.clone());
        let planned = self.plans.iter().position(|(at, _)| *at == step);
        let act = match planned {
            _ if self.crash_at == Some(self.seen.len()) => Some(Act::Crash),
            Some(at) => Some(self.plans.remove(at).1),
            None => self.by_chance(label),
        }?;
        self.crashed = act == Act::Crash;
        self.hits.push((step, act));
        Some(act)
    }

    fn by_chance(&mut self, label: &str) -> Option<Act> {
        let (dice, odds) = self.random.as_mut()?;
        if !label.starts_with("before ") || !dice.one_in(*odds) {
            return None;
        }
        // A store that refuses is rarer than a monitor that fails.
        if label.starts_with("before store") {
            return dice.one_in(4).then_some(Act::Refuse);
        }
        Some(match dice.below(8) {
            0 => Act::Die,
            1 => Act::DieAfter,
            2 | 3 => Act::RefuseAfter,
            _ => Act::Refuse,
        })
    }
}

/// Crashes are expected: their panics are not printed.
pub fn quiet_crashes() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if info.payload().downcast_ref::<Crash>().is_none() {
                usual(info);
            }
        }));
    });
}
