// Host: values that are made once for each key.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace lorafuse {

// Of `most` keys at most: the next one empties it. Threads may share it.
template <class Value, int kWords>
class Cache {
 public:
  using Key = std::array<uint64_t, kWords>;

  explicit Cache(size_t most) : most_(most) {}

  // The value of `key`, which make() makes where it is not there. What make() throws leaves the cache as it was.
  template <class Make>
  Value get(const Key& key, Make make) {
    const std::lock_guard lock(mutex_);
    if (const auto at = values_.find(key); at != values_.end()) return at->second;
    const Value value = make();
    if (values_.size() >= most_) values_.clear();
    values_.emplace(key, value);
    return value;
  }

 private:
  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t hash = 0;
      for (const uint64_t word : key) {
        hash = (hash ^ word) * 0x9e3779b97f4a7c15;
        hash ^= hash >> 32;
      }
      return hash;
    }
  };

  const size_t most_;
  std::mutex mutex_;
  std::unordered_map<Key, Value, Hash> values_;
};

}  // namespace lorafuse
