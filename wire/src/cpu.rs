//! CPU profiles: what a guest may see of a CPU, so that it can run on every host of a fleet.
//!
//! `host` is the CPU of the host where the machine was first started; it moves only to hosts that have all of its features. A baseline is one of
//! the levels of the x86-64 psABI, and nothing else: two hosts that have the level show the same guest the same features, whatever else they
//! have. Features go by the names of Linux's `/proc/cpuinfo`, as everywhere in the fleet.

/// Features of `x86-64-v2` beyond what every 64-bit CPU has.
const V2: [&str; 7] = ["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"];
/// What `x86-64-v3` adds.
const V3: [&str; 9] = ["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"];
/// What `x86-64-v4` adds.
const V4: [&str; 5] = ["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"];

/// A CPU profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    /// `x86-64-v2`: about 2009.
    V2,
    /// `x86-64-v3`: about 2015, AVX2.
    V3,
    /// `x86-64-v4`: AVX-512.
    V4,
    /// All that the host has.
    Host,
}

/// A profile that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU profile `{0}`: take host, x86-64-v2, x86-64-v3 or x86-64-v4")]
pub struct UnknownProfile(pub String);

impl Profile {
    /// All profiles.
    pub const ALL: [Self; 4] = [Self::Host, Self::V2, Self::V3, Self::V4];

    /// The profile's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
            Self::Host => "host",
        }
    }

    /// [`Profile::features`] as owned text.
    pub fn owned_features(self) -> Vec<String> {
        self.features().into_iter().map(str::to_owned).collect()
    }

    /// The features that a host must have for it, sorted; none for `host`, where they are the first host's.
    pub fn features(self) -> Vec<&'static str> {
        let parts: &[&[&'static str]] = match self {
            Self::V2 => &[&V2],
            Self::V3 => &[&V2, &V3],
            Self::V4 => &[&V2, &V3, &V4],
            Self::Host => &[],
        };
        let mut all = parts.concat();
        all.sort_unstable();
        all
    }
}

impl std::str::FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        let found = Self::ALL.into_iter().find(|profile| profile.name() == name);
        found.ok_or_else(|| UnknownProfile(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for profile in Profile::ALL {
            assert_eq!(profile.name().parse(), Ok(profile));
        }
        assert!("".parse::<Profile>().is_err());
        let error = "x86-64-v5".parse::<Profile>().unwrap_err().to_string();
        assert!(error.contains("x86-64-v5") && error.contains("x86-64-v4"), "{error}");
    }

    #[test]
    fn each_level_has_all_of_the_one_below() {
        let (v2, v3, v4) = (Profile::V2.features(), Profile::V3.features(), Profile::V4.features());
        assert!(v2.iter().all(|f| v3.contains(f)) && v3.iter().all(|f| v4.contains(f)));
        assert_eq!((v2.len(), v3.len(), v4.len()), (7, 16, 21));
        assert!(v4.is_sorted());
    }
}
