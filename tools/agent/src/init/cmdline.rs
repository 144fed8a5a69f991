//! Words of the kernel's command line.

/// The command line, split as the kernel does: at white space, but for what is in double quotes. Later words win.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cmdline(Vec<(String, Option<String>)>);

impl Cmdline {
    /// Splits a command line.
    pub fn parse(text: &str) -> Self {
        let mut words = vec![String::new()];
        let mut quoted = false;
        for letter in text.chars() {
            match (letter, words.last_mut()) {
                ('"', _) => quoted = !quoted,
                (letter, _) if letter.is_whitespace() && !quoted => words.push(String::new()),
                (letter, Some(word)) => word.push(letter),
                (_, None) => {}
            }
        }
        let split = |word: String| match word.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (word, None),
        };
        Self(words.into_iter().filter(|word| !word.is_empty()).map(split).collect())
    }

    /// Value of the last word `name=value` that is not empty.
    pub fn value(&self, name: &str) -> Option<&str> {
        let mut values = self.0.iter().rev().filter(|(known, _)| known == name);
        values.find_map(|(_, value)| value.as_deref()).filter(|value| !value.is_empty())
    }

    /// Whether the word stands there, without a value.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, value)| known == name && value.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_values_and_quotes() {
        let line =
            Cmdline::parse("console=ttyS0 root=/dev/vdb rw init=/bin/x root=\"/dev/v d\"  quiet x= \n");
        assert_eq!(line.value("root"), Some("/dev/v d"));
        assert_eq!((line.value("init"), line.value("x"), line.value("rw")), (Some("/bin/x"), None, None));
        assert!(line.has("rw") && line.has("quiet") && !line.has("root") && !line.has("q"));
        assert_eq!(Cmdline::parse(""), Cmdline::default());
    }
}
