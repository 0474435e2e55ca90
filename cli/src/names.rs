//! Names for instances whose owner gave none: an adjective, an animal that sleeps well, and four
//! random characters, so that a thousand of them rarely meet.
use rand::{Rng, seq::IndexedRandom as _};

const ADJECTIVES: &[&str] = &[
    "brave", "calm", "clever", "cosy", "drowsy", "eager", "fluffy", "gentle", "happy", "hazy",
    "idle", "jolly", "keen", "lazy", "lucky", "mellow", "merry", "misty", "nimble", "placid",
    "plucky", "proud", "quiet", "rested", "serene", "silent", "sleepy", "slow", "snug", "soft",
    "spry", "still", "sunny", "tender", "tidy", "warm",
];
const ANIMALS: &[&str] = &[
    "armadillo",
    "badger",
    "bat",
    "bear",
    "beaver",
    "cat",
    "dormouse",
    "falcon",
    "ferret",
    "fox",
    "gecko",
    "hare",
    "hedgehog",
    "heron",
    "koala",
    "lemur",
    "lion",
    "lynx",
    "marmot",
    "mole",
    "otter",
    "owl",
    "panda",
    "possum",
    "puffin",
    "python",
    "quokka",
    "raccoon",
    "robin",
    "seal",
    "skunk",
    "sloth",
    "squirrel",
    "tiger",
    "tortoise",
    "wombat",
];
/// Easy to read aloud and to type; no letter that looks like a digit.
const SUFFIX: &[u8] = b"23456789abcdefghjkmnpqrstuvwxyz";

/// A name that the server accepts: lower-case letters, digits and dashes, well below 63 characters.
pub fn generate(random: &mut impl Rng) -> String {
    let mut name = String::new();
    for list in [ADJECTIVES, ANIMALS] {
        name.push_str(list.choose(random).copied().unwrap_or("doze"));
        name.push('-');
    }
    for _ in 0..4 {
        name.push(SUFFIX.choose(random).copied().map_or('x', char::from));
    }
    name
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    #[test]
    fn every_name_is_one_the_contract_allows() {
        let mut random = StdRng::seed_from_u64(7);
        for _ in 0..2000 {
            let name = generate(&mut random);
            assert!(name.len() <= 63, "{name}");
            assert!(
                name.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
                "{name}"
            );
            assert_eq!(name.split('-').count(), 3, "{name}");
            assert!(name.split('-').all(|part| !part.is_empty()), "{name}");
        }
    }

    #[test]
    fn a_thousand_names_differ() {
        let mut random = StdRng::seed_from_u64(1);
        let names: BTreeSet<_> = (0..1000).map(|_| generate(&mut random)).collect();
        assert_eq!(names.len(), 1000);
    }
}
